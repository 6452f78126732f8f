"""All targets: each module registers its own when it is imported."""

from tests.fuzz import database, endpoints, files, mail, smtp, web
from tests.fuzz.harness import TARGETS

__all__ = ["TARGETS", "database", "endpoints", "files", "mail", "smtp", "web"]
