//! A real cluster on one machine, and the scenarios that run on it.

pub mod cluster;
pub mod containerd;
pub mod cri;
pub mod daemon;
pub mod health;
pub mod host;
pub mod images;
pub mod inspect;
pub mod load;
pub mod netns;
pub mod operator;
pub mod registry;
pub mod rescue;
pub mod rootfs;
pub mod tenant;
pub mod timeline;
pub mod tools;
