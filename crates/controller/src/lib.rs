//! The controller: watches, decides, drives agents. Must not know containerd.

pub mod leader;
