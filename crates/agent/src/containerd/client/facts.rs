//! Version, platform and snapshotter, by introspection and CRI.

use containerd_client::services::v1 as api;
use tote_image::Platform;

use super::call::{request, unary};
use super::{Client, cri};
use crate::containerd::snapshotter::{Plugin, choose};
use crate::containerd::{Error, Facts};

/// The type of snapshotter plugins.
const SNAPSHOTTER: &str = "io.containerd.snapshotter.v1";

pub(super) async fn facts(client: &Client) -> Result<Facts, Error> {
    let version = unary(client.version().version(request(()))).await?.version;
    let message = api::PluginsRequest { filters: vec![format!("type=={SNAPSHOTTER}")] };
    let plugins = unary(client.introspection().plugins(request(message))).await?.plugins;
    let platform = plugins.iter().flat_map(|plugin| &plugin.platforms).next().map_or_else(
        || Platform::new(std::env::consts::OS, std::env::consts::ARCH, ""),
        |platform| Platform::new(&platform.os, &platform.architecture, &platform.variant),
    );
    let plugins: Vec<Plugin> = plugins
        .into_iter()
        .map(|plugin| Plugin {
            id: plugin.id,
            root: plugin.exports.get("root").cloned(),
            failed: plugin.init_err.map(|status| status.message),
        })
        .collect();
    let answer = unary(client.cri().image_fs_info(tonic::Request::new(cri::ImageFsInfoRequest {}))).await;
    let snapshotter = match answer {
        Ok(info) => {
            let first = info.image_filesystems.into_iter().find_map(|usage| usage.fs_id);
            match first {
                Some(id) => choose(&id.mountpoint, &plugins),
                None => Err("CRI's ImageFsInfo names no file system for images".to_owned()),
            }
        }
        Err(Error::Unavailable(message)) => return Err(Error::Unavailable(message)),
        Err(error) => Err(format!("CRI does not tell where it keeps images: {error}")),
    };
    Ok(Facts { version: version.trim_start_matches('v').to_owned(), platform, snapshotter })
}
