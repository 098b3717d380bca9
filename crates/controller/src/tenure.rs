//! How long a leader may act without asking anybody, and a client that holds it to that. Must not know how a leader is
//! elected, or what it does.
//!
//! A process that was stopped for longer than its Lease lasts (a frozen node, a debugger, a SIGSTOP) takes itself for the
//! leader when it goes on, until its next look at the Lease; by then it may have written what it knew before.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::{Method, Request};
use kube::Client;
use kube::client::Body;
use thiserror::Error;

/// What a leader may do: all until a time, by a clock that goes on while the process is stopped (`CLOCK_MONOTONIC`).
#[derive(Clone, Debug, Default)]
pub struct Tenure(Arc<Mutex<Option<Instant>>>);

/// Nothing is written any more.
#[derive(Debug, Error)]
#[error("the leadership has run out: nothing is written any more")]
pub struct RunOut;

impl Tenure {
    /// It was confirmed by a call that began then, and holds for so long.
    pub fn confirm(&self, asked: Instant, length: Duration) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = asked.checked_add(length);
    }

    /// It is over.
    pub fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether it holds at a time.
    pub fn holds(&self, now: Instant) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|end| now < end)
    }

    /// A client of the same API server that reads at any time, and writes while this holds.
    pub fn fence(&self, client: Client) -> Client {
        let (tenure, namespace) = (self.clone(), client.default_namespace().to_owned());
        let fenced = tower::service_fn(move |request: Request<Body>| {
            let (tenure, client) = (tenure.clone(), client.clone());
            async move {
                if request.method() != Method::GET && !tenure.holds(Instant::now()) {
                    return Err(kube::Error::Service(Box::new(RunOut)));
                }
                client.send(request).await
            }
        });
        Client::new(fenced, namespace)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::Api;
    use kube::api::{DeleteParams, Patch, PatchParams, PostParams};

    use super::*;

    const LENGTH: Duration = Duration::from_secs(6);

    #[test]
    fn it_holds_from_the_question_on_for_its_length() {
        let (tenure, asked) = (Tenure::default(), Instant::now());
        assert!(!tenure.holds(asked), "never confirmed");
        tenure.confirm(asked, LENGTH);
        assert!(tenure.clone().holds(asked + LENGTH / 2));
        assert!(!tenure.holds(asked + LENGTH));
        tenure.confirm(asked + LENGTH / 2, LENGTH);
        assert!(tenure.holds(asked + LENGTH));
        tenure.end();
        assert!(!tenure.holds(asked));
    }

    #[tokio::test]
    async fn who_was_stopped_for_too_long_reads_and_does_not_write() {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = calls.clone();
        let answer = move |_: Request<Body>| {
            counted.fetch_add(1, Ordering::Relaxed);
            let body =
                serde_json::json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}});
            std::future::ready(Ok::<_, std::io::Error>(http::Response::new(Body::from(
                body.to_string().into_bytes(),
            ))))
        };
        let tenure = Tenure::default();
        let client = tenure.fence(Client::new(tower::service_fn(answer), "default"));
        let api: Api<ConfigMap> = Api::default_namespaced(client);
        let writes = async || {
            let (post, patch) = (PostParams::default(), PatchParams::default());
            let change = Patch::Merge(serde_json::json!({}));
            [
                api.create(&post, &ConfigMap::default()).await.is_ok(),
                api.replace("x", &post, &ConfigMap::default()).await.is_ok(),
                api.patch("x", &patch, &change).await.is_ok(),
                api.delete("x", &DeleteParams::default()).await.is_ok(),
            ]
        };
        assert_eq!(writes().await, [false; 4]);
        assert_eq!(calls.load(Ordering::Relaxed), 0, "nothing has come to the API server");
        api.get("x").await.unwrap();
        tenure.confirm(Instant::now(), LENGTH);
        assert_eq!(writes().await, [true; 4]);
        let error = {
            tenure.confirm(Instant::now().checked_sub(LENGTH).unwrap(), LENGTH);
            api.delete("x", &DeleteParams::default()).await.unwrap_err()
        };
        assert!(format!("{error:?}").contains("RunOut"), "{error:?}");
        assert_eq!(calls.load(Ordering::Relaxed), 5);
    }
}
