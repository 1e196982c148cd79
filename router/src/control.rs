//! What the router tells the launcher: one JSON object per line over an inherited socket.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::json;

use crate::engine::Control;

/// A callback for the engine that passes on what it says; without a socket it only logs.
pub fn channel(socket: Option<OwnedFd>) -> Arc<dyn Fn(Control) + Send + Sync> {
    let socket = Mutex::new(socket.map(UnixStream::from));
    Arc::new(move |control| {
        let line = match control {
            Control::Ready => {
                tracing::info!("ready");
                json!({"event": "ready"})
            }
            Control::ShardHung { epoch, reason } => {
                tracing::error!(epoch, reason, "the shards stopped answering");
                json!({"event": "shard_hung", "epoch": epoch, "reason": reason})
            }
        };
        let mut socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
        // A launcher that does not read any more is about to end this process anyway.
        if let Some(Err(error)) = socket
            .as_mut()
            .map(|socket| socket.write_all(format!("{line}\n").as_bytes()))
        {
            tracing::warn!(%error, "cannot tell the launcher");
        }
    })
}
