//! Identities that are certified from the beginning, as measuring needs them.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use tote_rpc::identity::{Authorities, Authority, Identity, Role};

/// One with a certificate of this authority, which it trusts.
pub fn certified(authority: &Authority, role: &Role, address: Option<IpAddr>) -> Result<Arc<Identity>> {
    let identity = Identity::new()?;
    identity.trust(&Authorities::from_certificates(vec![authority.certificate().clone()])?);
    let (now, life) = (SystemTime::now(), Duration::from_secs(3600));
    let certificate = authority.sign(role, address, identity.public_key(), now, life)?;
    identity.install(certificate, role)?;
    Ok(identity)
}

/// The controller's.
pub fn controller(authority: &Authority) -> Result<Arc<Identity>> {
    certified(authority, &Role::Controller, None)
}
