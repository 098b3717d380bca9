//! How a call is made: namespace and lease in its metadata, a deadline, errors in the seam's terms.

use std::future::Future;
use std::time::Duration;

use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status};

use super::NAMESPACE;
use crate::containerd::Error;

/// How long a call may take that moves no bytes. A forced collection on a busy node takes seconds.
const DEADLINE: Duration = Duration::from_secs(60);

/// A request in CRI's namespace.
pub(super) fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static(NAMESPACE));
    request
}

/// The same, with what it makes held by a lease.
pub(super) fn with_lease<T>(mut request: Request<T>, lease: &str) -> Result<Request<T>, Error> {
    let lease = lease.parse().map_err(|_| Error::Other(format!("lease name {lease:?} is not ASCII")))?;
    request.metadata_mut().insert("containerd-lease", lease);
    Ok(request)
}

/// Awaits an answer, for [`DEADLINE`] at most.
pub(super) async fn unary<T>(
    call: impl Future<Output = Result<Response<T>, Status>> + Send,
) -> Result<T, Error> {
    let late = || Error::Unavailable(format!("no answer within {} s", DEADLINE.as_secs()));
    within(DEADLINE, late, call).await
}

/// Awaits an answer for a stated time.
pub(super) async fn within<T>(
    deadline: Duration,
    late: impl FnOnce() -> Error,
    call: impl Future<Output = Result<Response<T>, Status>> + Send,
) -> Result<T, Error> {
    match tokio::time::timeout(deadline, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(error(&status)),
        Err(_) => Err(late()),
    }
}

/// containerd's status in the seam's terms.
pub(super) fn error(status: &Status) -> Error {
    let message = status.message().to_owned();
    if message.contains("no space left on device") || message.contains("disk quota exceeded") {
        return Error::Full(message);
    }
    match status.code() {
        Code::NotFound => Error::NotFound(message),
        Code::AlreadyExists => Error::AlreadyExists(message),
        Code::FailedPrecondition => Error::Mismatch(message),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => Error::Unavailable(message),
        // What tonic says when the connection breaks under a call, or under the stream that answers it.
        Code::Unknown if message.contains("transport error") => Error::Unavailable(message),
        Code::Internal | Code::Unknown if message.contains("h2 protocol error") => {
            Error::Unavailable(message)
        }
        // What CRI says while containerd starts (1.7.35 and 2.4.2, `errServerNotInitialized` as Unknown).
        Code::Unknown if message.contains("server is not initialized yet") => Error::Unavailable(message),
        code => Error::Other(format!("{message} ({code:?})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_comes_too_late_is_what_its_caller_says() {
        let never = std::future::pending::<Result<Response<()>, Status>>;
        assert!(matches!(unary(never()).await, Err(Error::Unavailable(_))), "containerd is away");
        let late = || Error::Other("too long".to_owned());
        assert!(matches!(within(DEADLINE, late, never()).await, Err(Error::Other(_))));
    }

    #[test]
    fn a_containerd_that_starts_does_not_answer() {
        for status in [
            Status::unavailable("connection refused"),
            Status::unknown("transport error"),
            Status::internal("h2 protocol error: broken pipe"),
            Status::unknown("h2 protocol error: error reading a body from connection"),
            Status::unknown("server is not initialized yet"),
        ] {
            assert!(matches!(error(&status), Error::Unavailable(_)), "{status:?}");
        }
        assert!(matches!(error(&Status::unknown("something else")), Error::Other(_)));
        assert!(matches!(error(&Status::unknown("write x: no space left on device")), Error::Full(_)));
    }
}
