//! tote-agent.
