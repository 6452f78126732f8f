"""The settings of a Django project that has nothing but mail, for django-mailer and django-post_office."""

from bench.peers.job import told

JOB = told()
_NAME, _USER, _HOST, _PORT = JOB.database_parts
THREADS = 5

SECRET_KEY = "of no use"  # noqa: S105 - nothing is signed
USE_TZ = True
INSTALLED_APPS = ["mailer", "post_office"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates"}]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _NAME,
        "USER": _USER,
        "HOST": _HOST,
        "PORT": _PORT,
        "CONN_MAX_AGE": None,
    }
}
EMAIL_HOST = JOB.host
EMAIL_PORT = JOB.port

MAILER_EMAIL_BACKEND = "bench.peers.django_mailer.KeptBackend"
MAILER_USE_FILE_LOCK = False

POST_OFFICE = {
    "BACKENDS": {"default": "django.core.mail.backends.smtp.EmailBackend"},
    "BATCH_SIZE": 1000,
    "THREADS_PER_PROCESS": THREADS,
    "LOG_LEVEL": 1,
}
