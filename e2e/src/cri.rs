//! CRI's `PullImage`, as kubelet calls it. Must not know what for.

use std::path::Path;

use anyhow::Result;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Endpoint, Uri};

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

/// Lets the containerd behind a socket pull an image; returns its ID.
///
/// # Errors
/// It does not answer, or cannot pull it.
pub async fn pull(socket: &Path, image: &str) -> Result<String> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://containerd").connect_with_connector(connector).await?;
    let mut client = Grpc::new(channel);
    client.ready().await?;
    let message = PullImageRequest { image: Some(ImageSpec { image: image.to_owned() }) };
    let codec = tonic_prost::ProstCodec::<PullImageRequest, PullImageResponse>::default();
    let method = PathAndQuery::from_static("/runtime.v1.ImageService/PullImage");
    Ok(client.unary(tonic::Request::new(message), method, codec).await?.into_inner().image_ref)
}
