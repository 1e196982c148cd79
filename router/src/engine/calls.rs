//! Calls about adapters: they run beside the steps, and what comes of them goes to the scheduler.

use futures::future::BoxFuture;
use kvrun_proto::LoadedAdapter;
use kvrun_scheduler::{AdapterOrder, LoadFault, Residency};
use tonic::{Code, Status};

use super::adapters::Registry;
use super::drive::Driver;
use super::shards::Group;

/// A finished call about an adapter.
pub(super) enum Called {
    Loaded(u64, Result<LoadedAdapter, Status>),
    Unloaded(u64),
}

impl Driver {
    pub(super) fn called(&mut self, called: Called) {
        let now = self.now();
        match called {
            Called::Unloaded(handle) => self.scheduler.adapter_unloaded(handle),
            Called::Loaded(handle, Ok(loaded)) => {
                let id = self.scheduler.adapters().of_handle(handle);
                self.scheduler.adapter_loaded(
                    now,
                    handle,
                    &loaded.digest,
                    loaded.bytes,
                    loaded.pages,
                );
                if let Some(id) = id {
                    self.registry.describe(id, &loaded);
                }
            }
            Called::Loaded(handle, Err(status)) => {
                let fault = match status.code() {
                    Code::NotFound => LoadFault::Missing,
                    Code::ResourceExhausted => LoadFault::NoRoom,
                    // Says nothing about the adapter. Where the connection broke, the epoch ends as well.
                    Code::Unavailable | Code::Aborted | Code::Cancelled | Code::Unknown => {
                        LoadFault::Unanswered
                    }
                    _ => LoadFault::Unfit,
                };
                let id = self.scheduler.adapters().of_handle(handle);
                let reason = status.message();
                self.scheduler
                    .adapter_load_failed(now, handle, fault, reason);
                let adapters = self.scheduler.adapters();
                let view = id.and_then(|id| adapters.get(id));
                let absent = view.is_some_and(|view| view.residency == Residency::Absent);
                if absent && !id.is_some_and(|id| adapters.is_coming(id)) {
                    tracing::info!(
                        reason,
                        "no room to load more adapters early; the first request for one loads it"
                    );
                } else {
                    tracing::warn!(handle, reason, "an adapter was not loaded");
                }
            }
        }
    }
}

/// Carries out an order of the scheduler.
pub(super) fn call(
    group: &Group,
    registry: &Registry,
    order: AdapterOrder,
) -> BoxFuture<'static, Called> {
    match order {
        AdapterOrder::Load { adapter, handle } => {
            let info = registry.get(adapter);
            let (name, path) = info.map_or_else(Default::default, |info| {
                (info.name, info.path.to_string_lossy().into_owned())
            });
            let load = group.load(handle, name, path);
            Box::pin(async move { Called::Loaded(handle, load.await) })
        }
        AdapterOrder::Unload { handle } => {
            let unload = group.unload(handle);
            Box::pin(async move {
                if let Err(status) = unload.await {
                    tracing::warn!(
                        handle,
                        reason = status.message(),
                        "an adapter was not unloaded"
                    );
                }
                Called::Unloaded(handle)
            })
        }
    }
}
