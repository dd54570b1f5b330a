"""Every error Punchline raises on purpose, with its HTTP status and stable code on the class.

PunchlineError
├── StartRefused                    the process must not start: exit code 3, one line
│   ├── SettingsInvalid
│   └── ArtifactInvalid
├── OutOfMemory                     the device could not hold a batch: the batcher halves it; no answer to a client
├── DeviceBroken                    nothing the device says can be believed any more: the process leaves, exit code 5
└── ApiError                        becomes the one error shape of the API
    ├── RequestError                4xx: sending the same again cannot help
    │   ├── BadHttp                 400   ├── HeadTimeout            408
    │   ├── InvalidJson             400   ├── BodyTooLarge           413
    │   ├── DuplicateKey            400   ├── TooManyItems           413
    │   ├── TooDeep                 400   ├── TooManyTokens          413
    │   ├── MultipartInvalid        400   ├── CaptionTooLarge        413
    │   ├── Unauthorized            401   ├── ImageTooLarge          413
    │   ├── UrlNotAllowed           403   ├── UnsupportedMediaType   415
    │   ├── NotFound                404   ├── ImageFormatNotAllowed  415
    │   ├── ImageUnknown            404   ├── InvalidRequest         422
    │   ├── ModelUnknown            404   ├── ImageRejected          422
    │   ├── MethodNotAllowed        405   └── ItemRejected           422
    │   ├── BodyTimeout             408
    │   ├── HeadTooLarge            431
    │   └── FingerprintMismatch     412
    ├── Unavailable                 503 + Retry-After: the same request will do later
    │   ├── Overloaded
    │   ├── Draining
    │   ├── NotReady
    │   ├── DeadlineExceeded
    │   └── DeviceFault
    ├── ImageFetchFailed            502: an image that was named by its address did not come
    │   └── ImageFetchTimeout       504
    ├── DeviceHung                  504: the batch never came back
    └── ScoringFailed               500: the device or the model failed this request
        ├── NonfiniteScore
        └── DoesNotFit
"""


class PunchlineError(Exception):
    """Base of the tree; `str(error)` is safe to show and never contains input."""


class StartRefused(PunchlineError):
    """The process must not start; `str(error)` is the one line that says why."""

    exit_code = 3


class SettingsInvalid(StartRefused):
    """A setting is unknown, out of range or contradicts another."""


class ArtifactInvalid(StartRefused):
    """A model file is missing, wrong, or does not fit the others."""


class OutOfMemory(PunchlineError):
    """A scorer ran out of memory and kept nothing of the batch; smaller ones may fit.

    A caption that does not fit alone ends in ScoringFailed with the code `out_of_memory`.
    """


class DeviceBroken(PunchlineError):
    """Nothing the device computes from now on can be believed, or nothing comes any more. Raised by a scorer, it ends the batch loop.

    `kind`: `sticky` (a fault that stays in the process), `hang`, `memory` (not even one caption fits any more), `died` (a thread of
    the batch loop), `drift` (golden scores are wrong now).
    """

    exit_code = 5

    def __init__(self, message: str, *, kind: str = "sticky") -> None:
        super().__init__(message)
        self.kind = kind


class ApiError(PunchlineError):
    """An answer other than a score.

    `field` names the part of the request at fault (`groups[2].image`), `index` the caption.
    """

    status = 500
    code = "internal_error"
    retryable = False
    default_field: str | None = None

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        index: int | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field or type(self).default_field
        self.index = index
        self.code = code or type(self).code
        self.headers = headers or {}


class RequestError(ApiError):
    """The request itself is at fault: sending it again cannot help."""

    status = 400
    code = "bad_request"


class BadHttp(RequestError):
    """The bytes are no HTTP/1 request."""

    code = "bad_http"


class InvalidJson(RequestError):
    code = "invalid_json"


class DuplicateKey(RequestError):
    code = "duplicate_key"


class TooDeep(RequestError):
    code = "too_deep"


class MultipartInvalid(RequestError):
    code = "multipart_invalid"


class Unauthorized(RequestError):
    status = 401
    code = "unauthorized"


class UrlNotAllowed(RequestError):
    status = 403
    code = "url_not_allowed"
    default_field = "image"


class NotFound(RequestError):
    status = 404
    code = "not_found"


class ImageUnknown(RequestError):
    """The image id is not (or no longer) held: the client sends the bytes."""

    status = 404
    code = "image_unknown"
    default_field = "image"


class ModelUnknown(RequestError):
    """No model of the name that the request gives is served."""

    status = 404
    code = "model_unknown"
    default_field = "model"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


class HeadTimeout(RequestError):
    """The head of a request stopped arriving. Retryable, as a body that stops is."""

    status = 408
    code = "head_timeout"
    retryable = True


class BodyTimeout(RequestError):
    """The body stopped arriving. Retryable: a slow network is nobody's fault."""

    status = 408
    code = "body_timeout"
    retryable = True


class HeadTooLarge(RequestError):
    status = 431
    code = "head_too_large"


class FingerprintMismatch(RequestError):
    status = 412
    code = "model_changed"


class BodyTooLarge(RequestError):
    status = 413
    code = "body_too_large"


class TooManyItems(RequestError):
    status = 413
    code = "too_many_items"


class TooManyTokens(RequestError):
    """One caption with its prefix is larger than any batch: it could never be scheduled."""

    status = 413
    code = "too_many_tokens"


class CaptionTooLarge(RequestError):
    status = 413
    code = "caption_too_large"


class ImageTooLarge(RequestError):
    status = 413
    code = "image_too_large"
    default_field = "image"


class UnsupportedMediaType(RequestError):
    status = 415
    code = "unsupported_media_type"


class ImageFormatNotAllowed(RequestError):
    status = 415
    code = "image_format_not_allowed"
    default_field = "image"


class InvalidRequest(RequestError):
    """The request does not have the documented shape."""

    status = 422
    code = "invalid_request"


class ImageRejected(RequestError):
    """The image bytes cannot be scored: `image_decode_failed`, `animated_not_allowed`, ..."""

    status = 422
    code = "image_decode_failed"
    default_field = "image"


class ItemRejected(RequestError):
    """One caption cannot be scored; with `on_item_error="null"` only that caption fails."""

    status = 422
    code = "caption_rejected"


class Unavailable(ApiError):
    """Nothing is wrong with the request; it carries the seconds to wait."""

    status = 503
    code = "unavailable"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    code = "overloaded"


class Draining(Unavailable):
    code = "draining"


class NotReady(Unavailable):
    code = "not_ready"


class DeadlineExceeded(Unavailable):
    code = "deadline_exceeded"


class DeviceFault(Unavailable):
    """The device or the batch loop broke before this request had its scores; the process leaves, its successor may answer."""

    code = "device_fault"


class ImageFetchFailed(ApiError):
    """The host of an image that was named by its address could not be asked, or did not answer properly."""

    status = 502
    code = "image_fetch_failed"
    retryable = True
    default_field = "image"


class ImageFetchTimeout(ImageFetchFailed):
    status = 504
    code = "image_fetch_timeout"


class DeviceHung(ApiError):
    """The batch with this request went to the device and did not come back in time."""

    status = 504
    code = "device_hung"
    retryable = True


class ScoringFailed(ApiError):
    """The forward pass failed. Retryable: another replica, or this one later, may succeed."""

    status = 500
    code = "scoring_failed"
    retryable = True


class DoesNotFit(ScoringFailed):
    """One caption alone takes more memory than the device has left; the same request fails again."""

    code = "out_of_memory"
    retryable = False


class NonfiniteScore(ScoringFailed):
    """The model returned NaN or infinity; no number is sent."""

    code = "nonfinite_score"
    retryable = False
