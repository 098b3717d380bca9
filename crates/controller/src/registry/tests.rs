//! Look-ups against registries that are played: every way in which one can answer, and fail to.

use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::header::{AUTHORIZATION, LOCATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, Request, Response};
use tokio::net::TcpListener;

use super::*;

const MANIFEST: &[u8] = b"{}";

/// Plays a registry; `answer` gets its address and each request. Returns the address.
async fn played<F>(answer: F) -> String
where
    F: Fn(&str, &Request<Body>) -> Response<Body> + Clone + Send + Sync + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let own = address.clone();
    let router =
        Router::new().fallback(move |request: Request<Body>| std::future::ready(answer(&own, &request)));
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

fn status(status: u16) -> Response<Body> {
    Response::builder().status(status).body(Body::empty()).unwrap()
}

fn with(code: u16, name: &str, value: &str) -> Response<Body> {
    Response::builder().status(code).header(name, value).body(Body::empty()).unwrap()
}

fn authorization(headers: &HeaderMap) -> &str {
    headers.get(AUTHORIZATION).map_or("", |value| value.to_str().unwrap())
}

fn lookup(hosts: &[&str]) -> Lookup {
    let hosts: Vec<HostPattern> = hosts.iter().map(|host| host.parse().unwrap()).collect();
    Lookup::new(Settings { insecure: hosts.clone(), hosts, timeout: Duration::from_secs(1), ca_pem: None })
        .unwrap()
}

async fn ask(host: &str, credentials: &[Credential]) -> Result<Digest, LookupError> {
    lookup(&[host]).digest(&format!("{host}/a/b:v1").parse().unwrap(), credentials).await
}

async fn says<F>(answer: F) -> Result<Digest, LookupError>
where
    F: Fn(&str, &Request<Body>) -> Response<Body> + Clone + Send + Sync + 'static,
{
    ask(&played(answer).await, &[]).await
}

fn password(username: &str, password: &str) -> Credential {
    Credential::Password { username: username.to_owned(), password: password.to_owned() }
}

fn digest() -> Digest {
    Digest::sha256(MANIFEST)
}

#[tokio::test]
async fn the_header_of_head_tells_and_a_manifest_where_it_does_not() {
    let header = says(|_, request| {
        assert_eq!((request.method().as_str(), request.uri().path()), ("HEAD", "/v2/a/b/manifests/v1"));
        with(200, "docker-content-digest", digest().as_str())
    });
    assert_eq!(header.await, Ok(digest()));
    for head in [200, 400, 405, 501] {
        let body =
            says(
                move |_, request| {
                    if request.method() == "HEAD" {
                        status(head)
                    } else {
                        Response::new(Body::from(MANIFEST))
                    }
                },
            );
        assert_eq!(body.await, Ok(digest()), "HEAD {head}");
    }
}

#[tokio::test]
async fn a_digest_is_there_or_another_one_is_no_answer() {
    let right = played(|_, _| with(200, "docker-content-digest", digest().as_str())).await;
    let pinned = |host: &str, digest: Digest| format!("{host}/a/b@{digest}").parse::<Reference>().unwrap();
    assert_eq!(lookup(&[&right]).digest(&pinned(&right, digest()), &[]).await, Ok(digest()));
    let other = lookup(&[&right]).digest(&pinned(&right, Digest::sha256(b"other")), &[]).await;
    assert_eq!(other.unwrap_err().label(), "invalid");
    let body = played(|_, _| Response::new(Body::from(MANIFEST))).await;
    assert_eq!(lookup(&[&body]).digest(&pinned(&body, digest()), &[]).await, Ok(digest()));
    let other = lookup(&[&body]).digest(&pinned(&body, Digest::sha256(b"other")), &[]).await;
    assert_eq!(other.unwrap_err().label(), "invalid");
}

#[tokio::test]
async fn every_refusal_has_its_name() {
    for (code, label) in [
        (404, "not_found"),
        (401, "unauthorized"),
        (403, "denied"),
        (429, "rate_limited"),
        (500, "unavailable"),
        (503, "unavailable"),
    ] {
        assert_eq!(says(move |_, _| status(code)).await.unwrap_err().label(), label, "{code}");
    }
    let header = says(|_, _| with(200, "docker-content-digest", "sha256:123")).await;
    assert_eq!(header.unwrap_err().label(), "invalid");
}

#[tokio::test]
async fn who_is_not_listed_is_not_spoken_to() {
    let host = played(|_, _| panic!("it was asked")).await;
    let answer =
        lookup(&["r.test", "*.example.com"]).digest(&format!("{host}/a:1").parse().unwrap(), &[]).await;
    assert_eq!(answer, Err(LookupError::NotListed(host)));
}

#[tokio::test]
async fn no_answer_ends_in_time() {
    let began = Instant::now();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    assert_eq!(ask(&host, &[]).await, Err(LookupError::Timeout(host.clone(), Duration::from_secs(1))));
    drop(listener);
    let answer = ask(&host, &[]).await.unwrap_err();
    assert!(answer.to_string().contains("refused"), "{answer}");
    // A body that begins and never ends.
    let slow = says(|_, request| {
        let endless = futures::stream::pending::<Result<axum::body::Bytes, std::io::Error>>();
        if request.method() == "HEAD" { status(200) } else { Response::new(Body::from_stream(endless)) }
    });
    assert_eq!(slow.await.unwrap_err().label(), "timeout");
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_body_is_bounded_whether_its_length_is_told_or_not() {
    let told = says(|_, request| {
        if request.method() == "HEAD" {
            status(200)
        } else {
            Response::new(Body::from(vec![0; (4 << 20) + 1]))
        }
    });
    let untold = says(|_, request| {
        let endless = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![0u8; 1 << 16]));
        if request.method() == "HEAD" { status(200) } else { Response::new(Body::from_stream(endless)) }
    });
    for answer in [told.await, untold.await] {
        let error = answer.unwrap_err();
        assert!(error.label() == "invalid" && error.to_string().contains("longer than"), "{error}");
    }
    let token = says(|own, request| match request.uri().path() {
        "/token" => Response::new(Body::from(vec![b' '; 1 << 17])),
        _ => with(401, "www-authenticate", &format!("Bearer realm=\"http://{own}/token\"")),
    });
    assert_eq!(token.await.unwrap_err().label(), "invalid");
}

#[tokio::test]
async fn a_token_is_asked_for_where_the_registry_says_and_as_who_asks() {
    let play = |own: &str, request: &Request<Body>| {
        let (uri, proof) = (request.uri(), authorization(request.headers()));
        match (uri.path(), proof) {
            ("/token", proof) => {
                assert_eq!(uri.query(), Some("service=played&scope=repository%3Aa%2Fb%3Apull"));
                let token = match proof {
                    "" => "anonymous",
                    "Basic dTpy" => "u", // u:r
                    _ => return status(401),
                };
                Response::new(Body::from(format!("{{\"access_token\": \"{token}\"}}")))
            }
            (_, "Bearer u") => with(200, "docker-content-digest", digest().as_str()),
            (_, "Bearer anonymous") => status(403),
            _ => {
                let realm = format!(
                    "Bearer realm=\"http://{own}/token\",service=\"played\",scope=\"repository:a/b:pull\""
                );
                with(401, WWW_AUTHENTICATE.as_str(), &realm)
            }
        }
    };
    let host = played(play).await;
    assert_eq!(ask(&host, &[password("u", "r")]).await, Ok(digest()));
    assert_eq!(ask(&host, &[]).await.unwrap_err().label(), "denied");
    assert_eq!(ask(&host, &[password("u", "wrong")]).await.unwrap_err().label(), "unauthorized");
    assert_eq!(
        ask(&host, &[password("u", "wrong"), password("u", "r")]).await,
        Ok(digest()),
        "the next is tried"
    );

    // One look-up's token is of no use to the next.
    let (lookup, image) = (lookup(&[&host]), format!("{host}/a/b:v1").parse().unwrap());
    assert_eq!(lookup.digest(&image, &[password("u", "r")]).await, Ok(digest()));
    assert_eq!(lookup.digest(&image, &[]).await.unwrap_err().label(), "denied");
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let host = played(|own, request| match request.uri().path() {
        "/token" if request.method() == "POST" && request.uri().query().is_none() => {
            Response::new(Body::from("{\"access_token\": \"t\"}"))
        }
        "/token" => status(400),
        _ if authorization(request.headers()) == "Bearer t" => {
            with(200, "docker-content-digest", digest().as_str())
        }
        _ => with(401, "www-authenticate", &format!("Bearer realm=\"http://{own}/token\",service=\"s\"")),
    });
    assert_eq!(ask(&host.await, &[Credential::IdentityToken("i".into())]).await, Ok(digest()));
}

#[tokio::test]
async fn a_password_goes_where_the_registry_asks_for_it_and_nowhere_else() {
    let basic = |_: &str, request: &Request<Body>| match authorization(request.headers()) {
        "Basic dTpy" => with(200, "docker-content-digest", digest().as_str()),
        _ => with(401, "www-authenticate", "Basic realm=\"played\""),
    };
    let host = played(basic).await;
    assert_eq!(ask(&host, &[password("u", "r")]).await, Ok(digest()));
    for credentials in [&[][..], &[password("u", "x")], &[Credential::IdentityToken("t".into())]] {
        assert_eq!(ask(&host, credentials).await.unwrap_err().label(), "unauthorized");
    }

    // It redirects whoever has proved who asks, and the other gets no proof of it.
    let other = played(|_, request| {
        assert_eq!(authorization(request.headers()), "");
        with(200, "docker-content-digest", digest().as_str())
    });
    let to = format!("http://{}/v2/x/manifests/v1", other.await);
    let host = played(move |own, request| match authorization(request.headers()) {
        "" => basic(own, request),
        _ => with(307, LOCATION.as_str(), &to),
    });
    assert_eq!(ask(&host.await, &[password("u", "r")]).await, Ok(digest()));

    // Whom a redirect leads to may not ask for a proof.
    let thief =
        played(|own, _| with(401, "www-authenticate", &format!("Bearer realm=\"http://{own}/t\""))).await;
    let host =
        played(move |_, _| with(302, "location", &format!("http://{thief}/v2/a/b/manifests/v1"))).await;
    assert_eq!(ask(&host, &[password("u", "r")]).await.unwrap_err().label(), "unauthorized");
}

#[tokio::test]
async fn nobody_is_led_on_for_ever_or_to_where_no_registry_is() {
    for location in
        ["/again", "http://169.254.169.254/latest/meta-data", "http://localhost/x", "file:///etc/passwd"]
    {
        let error = says(move |_, _| with(307, "location", location)).await.unwrap_err();
        let expected = if location.contains("localhost") { "unavailable" } else { "invalid" };
        assert_eq!(error.label(), expected, "{location}: {error}");
    }
    let realm =
        says(|_, _| with(401, "www-authenticate", "Bearer realm=\"http://169.254.169.254/token\"")).await;
    assert_eq!(realm.unwrap_err().label(), "invalid");
}

#[tokio::test]
async fn an_answer_is_kept_and_belongs_to_whom_it_was_given() {
    let host = played(|_, request| match authorization(request.headers()) {
        "" => with(401, "www-authenticate", "Basic realm=\"played\""),
        _ => with(200, "docker-content-digest", digest().as_str()),
    })
    .await;
    let lookup = lookup(&[&host]);
    let image = format!("{host}/a/b:v1").parse().unwrap();
    let mine = [password("u", "r")];
    assert_eq!(lookup.digest(&image, &mine).await, Ok(digest()));
    assert_eq!(lookup.cached().get(&(image.clone(), mine.to_vec()), Timestamp::now()), Some(Ok(digest())));
    assert_eq!(lookup.digest(&image, &[]).await.unwrap_err().label(), "unauthorized");
}

#[test]
fn a_file_of_authorities_must_hold_one() {
    let with = |pem: &str| Lookup::new(Settings { ca_pem: Some(pem.into()), ..Settings::default() });
    for pem in ["", "text", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let error = with(pem).unwrap_err().to_string();
        assert!(error.contains("certificate authorities"), "{error}");
    }
}
