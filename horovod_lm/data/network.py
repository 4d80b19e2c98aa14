"""Find out quickly whether a server can be reached, before a library retries for minutes."""

from __future__ import annotations

SECONDS_TO_ANSWER = 5


def check_reachable(url: str) -> None:
    """Return when the server of `url` answers.

    Raises:
        ConnectionError: it does not, or says that there is no such page.
    """
    import requests

    try:
        requests.head(url, timeout=SECONDS_TO_ANSWER, allow_redirects=True).raise_for_status()
    except requests.RequestException:
        raise ConnectionError(f"{url} cannot be reached") from None
