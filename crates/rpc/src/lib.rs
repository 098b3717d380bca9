//! tote-rpc.
