"""The exceptions of the quickstart: something could not be shown, and why."""


class QuickstartError(Exception):
    """Printed without a traceback; the exit status is 1."""


class ServerTroubleError(QuickstartError):
    """The server refused, failed or fell silent: the end of its log is printed too."""
