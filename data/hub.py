"""Whether the Hugging Face Hub can be asked. Data sets and tokenizers come from there."""

import ssl
import urllib.error
import urllib.request

import huggingface_hub

_TIMEOUT = 5.0  # seconds until the Hub counts as out of reach


def hub_answers() -> bool:
    """Whether the Hub is within reach, known in seconds: its library would retry for minutes."""
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_TIMEOUT).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it answers; the library may know other certificates
    except OSError:
        return False
    return True
