//! What a cluster is to be.

use super::node::NodeSpec;
use crate::tools::Containerd;

/// What a cluster is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Tells clusters on one machine apart: up to 20 of `a-z0-9-`.
    pub name: String,
    /// Its nodes.
    pub nodes: Vec<NodeSpec>,
    /// The user whose requests the API server writes down, see [`super::Cluster::audit_log`].
    pub audited: Option<String>,
}

impl Options {
    /// Three nodes: n1 and n2 with containerd 2.x, n3 with 1.7.
    pub fn new(name: &str) -> Self {
        let nodes = vec![
            NodeSpec::new("n1", Containerd::V2),
            NodeSpec::new("n2", Containerd::V2),
            NodeSpec::new("n3", Containerd::V1_7),
        ];
        Self { name: name.to_owned(), nodes, audited: None }
    }

    /// The same three, [crowded](NodeSpec::crowded), with the requests of `audited` written down.
    pub fn crowded(name: &str, audited: &str) -> Self {
        let mut options = Self::new(name);
        options.nodes.iter_mut().for_each(|node| node.crowded = true);
        Self { audited: Some(audited.to_owned()), ..options }
    }
}
