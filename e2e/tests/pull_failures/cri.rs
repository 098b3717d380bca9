//! The calls of the Container Runtime Interface that kubelet makes to run a container, and their errors as grpc-go, and
//! so kubelet, prints them. The messages leave out what is not set.

use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
}

#[derive(Clone, PartialEq, Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct NamespaceOption {
    /// 2 is the node's.
    #[prost(int32, tag = "1")]
    network: i32,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxSandboxSecurityContext {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPodSandboxConfig {
    #[prost(message, optional, tag = "2")]
    security_context: Option<LinuxSandboxSecurityContext>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
}

/// The answers that matter have one string, in field 1.
#[derive(Clone, PartialEq, Message)]
struct Answer {
    #[prost(string, tag = "1")]
    id: String,
}

/// A client.
pub struct Cri {
    channel: Channel,
    runtime: tokio::runtime::Runtime,
}

impl Cri {
    /// One that dials when it is first used.
    pub fn new(socket: &Path) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let inside = runtime.enter();
        let channel = Endpoint::from_static("http://containerd").connect_with_connector_lazy(connector);
        drop(inside);
        Self { channel, runtime }
    }

    fn call<M>(&self, method: &'static str, message: M, limit: Duration) -> Result<String, String>
    where
        M: Message + Default + 'static,
    {
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        let answer = self.runtime.block_on(async {
            client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let mut request = Request::new(message);
            // containerd keeps to it, as to kubelet's.
            request.set_timeout(limit);
            let codec = tonic_prost::ProstCodec::<M, Answer>::default();
            client.unary(request, PathAndQuery::from_static(method), codec).await
        });
        answer.map(|answer| answer.into_inner().id).map_err(|status| said(&status))
    }

    /// `PullImage`, with a user's name and password if they are given.
    pub fn pull(&self, image: &str, auth: Option<(&str, &str)>, limit: Duration) -> Result<String, String> {
        let auth = auth.map(|(username, password)| AuthConfig {
            username: username.to_owned(),
            password: password.to_owned(),
        });
        let image = Some(ImageSpec { image: image.to_owned() });
        self.call("/runtime.v1.ImageService/PullImage", PullImageRequest { image, auth }, limit)
    }

    /// `RunPodSandbox` in the node's network namespace.
    pub fn sandbox(&self, name: &str) -> Result<String, String> {
        let request = RunPodSandboxRequest { config: Some(pod(name)) };
        self.call("/runtime.v1.RuntimeService/RunPodSandbox", request, Duration::from_secs(60))
    }

    /// `CreateContainer` in a sandbox.
    pub fn container(
        &self,
        sandbox: &str,
        pod_name: &str,
        name: &str,
        image: &str,
    ) -> Result<String, String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned() }),
            image: Some(ImageSpec { image: image.to_owned() }),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(pod(pod_name)),
        };
        self.call("/runtime.v1.RuntimeService/CreateContainer", request, Duration::from_secs(60))
    }
}

fn pod(name: &str) -> PodSandboxConfig {
    let network = Some(NamespaceOption { network: 2 });
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "test".to_owned(),
        }),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext { namespace_options: network }),
        }),
    }
}

fn said(status: &Status) -> String {
    let code = match status.code() {
        Code::Cancelled => "Canceled".to_owned(),
        code => format!("{code:?}"),
    };
    format!("rpc error: code = {code} desc = {}", status.message())
}
