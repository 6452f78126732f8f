"""Words of the pages for those who hold a link, in the languages that the packaged reports are translated to.

The language of a page is the report's; if that is plain English, which is the default, or has no translation, the
browser's. No Babel: these words have no numbers or dates, and any client may ask for any language.
"""

import re
from collections.abc import Mapping
from typing import Final

ENGLISH: Final = "en"
ACCEPTED_MAX: Final = 50  # languages of one Accept-Language

WORDS: Final[Mapping[str, Mapping[str, str]]] = {
    "en": {
        "unsubscribe": "Unsubscribe",
        "offer": "One click, and no more emails of this kind come to your address.",
        "done": "Done",
        "no more": "No more emails of “{title}” come to your address.",
        "undo": "Undo",
        "undone": "Undone",
        "again": "You get emails of “{title}” again.",
        "not found": "Not found",
        "no page": "This link is incomplete, or it has expired.",
        "too many": "Too many attempts",
        "wait": "Wait a little and try again.",
    },
    "de": {
        "unsubscribe": "Abbestellen",
        "offer": "Ein Klick, und es kommen keine E-Mails dieser Art mehr an Ihre Adresse.",
        "done": "Erledigt",
        "no more": "An Ihre Adresse kommen keine E-Mails von „{title}“ mehr.",
        "undo": "Rückgängig machen",
        "undone": "Rückgängig gemacht",
        "again": "Sie erhalten wieder E-Mails von „{title}“.",
        "not found": "Nicht gefunden",
        "no page": "Dieser Link ist unvollständig oder abgelaufen.",
        "too many": "Zu viele Versuche",
        "wait": "Bitte warten Sie einen Moment und versuchen Sie es dann erneut.",
    },
    "fr": {
        "unsubscribe": "Se désabonner",
        "offer": "Un clic, et vous ne recevrez plus d’e-mails de ce type à votre adresse.",
        "done": "C’est fait",
        "no more": "Vous ne recevrez plus d’e-mails «\N{NO-BREAK SPACE}{title}\N{NO-BREAK SPACE}» à votre adresse.",
        "undo": "Annuler",
        "undone": "Annulé",
        "again": "Vous recevrez de nouveau les e-mails «\N{NO-BREAK SPACE}{title}\N{NO-BREAK SPACE}».",
        "not found": "Page introuvable",
        "no page": "Ce lien est incomplet ou a expiré.",
        "too many": "Trop de tentatives",
        "wait": "Patientez un instant, puis réessayez.",
    },
    "es": {
        "unsubscribe": "Cancelar la suscripción",
        "offer": "Un clic y no recibirá más correos de este tipo en su dirección.",
        "done": "Hecho",
        "no more": "No recibirá más correos de «{title}» en su dirección.",
        "undo": "Deshacer",
        "undone": "Deshecho",
        "again": "Volverá a recibir los correos de «{title}».",
        "not found": "No encontrado",
        "no page": "Este enlace está incompleto o ha caducado.",
        "too many": "Demasiados intentos",
        "wait": "Espere un momento y vuelva a intentarlo.",
    },
    "it": {
        "unsubscribe": "Annulla l’iscrizione",
        "offer": "Un clic e al suo indirizzo non arriveranno più e-mail di questo tipo.",
        "done": "Fatto",
        "no more": "Al suo indirizzo non arriveranno più e-mail di «{title}».",
        "undo": "Annulla",
        "undone": "Annullato",
        "again": "Riceverà di nuovo le e-mail di «{title}».",
        "not found": "Pagina non trovata",
        "no page": "Questo link è incompleto o scaduto.",
        "too many": "Troppi tentativi",
        "wait": "Attenda un momento e riprovi.",
    },
    "nl": {
        "unsubscribe": "Afmelden",
        "offer": "Eén klik, en u ontvangt op uw adres geen e-mails van deze soort meer.",
        "done": "Gelukt",
        "no more": "U ontvangt op uw adres geen e-mails van ‘{title}’ meer.",
        "undo": "Ongedaan maken",
        "undone": "Ongedaan gemaakt",
        "again": "U ontvangt weer e-mails van ‘{title}’.",
        "not found": "Niet gevonden",
        "no page": "Deze link is onvolledig of verlopen.",
        "too many": "Te veel pogingen",
        "wait": "Wacht even en probeer het dan opnieuw.",
    },
    "pt": {
        "unsubscribe": "Cancelar a subscrição",
        "offer": "Um clique e não chegam mais e-mails deste tipo ao seu endereço.",
        "done": "Feito",
        "no more": "Não chegam mais e-mails de “{title}” ao seu endereço.",
        "undo": "Desfazer",
        "undone": "Desfeito",
        "again": "Voltará a receber os e-mails de “{title}”.",
        "not found": "Página não encontrada",
        "no page": "Esta ligação está incompleta ou expirou.",
        "too many": "Demasiadas tentativas",
        "wait": "Aguarde um momento e tente novamente.",
    },
    "pl": {
        "unsubscribe": "Zrezygnuj z subskrypcji",
        "offer": "Jedno kliknięcie i na ten adres nie będą już przychodzić takie wiadomości.",
        "done": "Gotowe",
        "no more": "Na ten adres nie będą już przychodzić wiadomości „{title}”.",
        "undo": "Cofnij",
        "undone": "Cofnięto",
        "again": "Wiadomości „{title}” będą znów przychodzić.",
        "not found": "Nie znaleziono",
        "no page": "Ten link jest niepełny lub wygasł.",
        "too many": "Zbyt wiele prób",
        "wait": "Odczekaj chwilę i spróbuj ponownie.",
    },
    "sv": {
        "unsubscribe": "Avsluta prenumerationen",
        "offer": "Ett klick, så kommer inga fler mejl av det här slaget till din adress.",
        "done": "Klart",
        "no more": "Inga fler mejl från ”{title}” kommer till din adress.",
        "undo": "Ångra",
        "undone": "Ångrat",
        "again": "Du får mejl från ”{title}” igen.",
        "not found": "Hittades inte",
        "no page": "Länken är ofullständig eller har gått ut.",
        "too many": "För många försök",
        "wait": "Vänta en stund och försök igen.",
    },
}

# One language of Accept-Language with its weight (RFC 9110 §12.5.4).
_ACCEPTED: Final = re.compile(r"\s*([A-Za-z]{2,8})(?:-[A-Za-z0-9-]*)?\s*(?:;\s*q\s*=\s*([01](?:\.[0-9]{0,3})?)\s*)?")


def language_of(report: str | None, accepted: str) -> str:
    """Return the key of WORDS for a report's language tag, if it is known, and an Accept-Language.

    A tag that says more than `en`, such as `en-GB`, was chosen by somebody, and goes before the browser's wish.
    """
    wish = (report or ENGLISH).lower()
    primary = wish.partition("-")[0]
    if primary in WORDS and wish != ENGLISH:
        return primary
    found: dict[str, float] = {}
    for item in accepted.split(",")[:ACCEPTED_MAX]:
        one = _ACCEPTED.fullmatch(item)
        if one is not None and one[1].lower() in WORDS:
            found.setdefault(one[1].lower(), float(one[2] or 1))
    best = max(found, key=lambda name: found[name], default=ENGLISH)
    return best if found.get(best, 1) > 0 else ENGLISH
