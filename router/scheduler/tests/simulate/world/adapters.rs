//! Folders of adapters, and the calls that load and unload them.

use super::{Call, Folder, World};
use kvrun_scheduler::{AdapterOrder, LoadFault};
use rand::Rng;
use rand::seq::IndexedRandom;

impl World {
    /// Adapters are registered, unloaded, pinned, asked for again, or changed on disk.
    pub(super) fn churn(&mut self) -> Result<(), String> {
        let registered: Vec<_> = self.folders.keys().copied().collect();
        let Some(&id) = registered
            .choose(&mut self.rng)
            .filter(|_| self.rng.random_bool(0.6))
        else {
            let pinned = self.rng.random_bool(0.1);
            let adapters = self.scheduler.adapters_mut();
            let id = match self.folders.len() % 3 {
                0 => adapters.register_early(0, pinned, self.now),
                _ => adapters.register(0, pinned, self.now),
            };
            let folder = Folder {
                digest: format!("digest {}", self.rng.random_range(0..1000)),
                bytes: self.rng.random_range(1..40),
                pages: self.rng.random_range(0..=self.adapter_pages),
                loaded: None,
                broken: self.rng.random_bool(0.1),
                left: false,
                was_unusable: false,
            };
            self.tell(|| {
                format!(
                    "adapter {} of {} bytes and {} pages is registered",
                    id.0, folder.bytes, folder.pages
                )
            });
            self.folders.insert(id, folder);
            return self.orders();
        };
        let adapters = self.scheduler.adapters_mut();
        match self.rng.random_range(0..8) {
            0..3 => {
                adapters.leave(id);
                self.folders
                    .get_mut(&id)
                    .into_iter()
                    .for_each(|folder| folder.left = true);
                self.tell(|| format!("adapter {} leaves", id.0));
            }
            3 => {
                adapters.pin(id, self.rng.random_bool(0.3));
            }
            4 => {
                let digest = format!("changed {}", self.rng.random_range(0..1000));
                self.folders
                    .get_mut(&id)
                    .into_iter()
                    .for_each(|folder| folder.digest = digest.clone());
            }
            _ => adapters.want(id),
        }
        self.orders()
    }

    pub(super) fn orders(&mut self) -> Result<(), String> {
        for order in self.scheduler.plan_adapters(self.now) {
            self.tell(|| format!("{order:?}"));
            self.calls.push(match order {
                AdapterOrder::Load { adapter, handle } => Call::Load(adapter, handle),
                AdapterOrder::Unload { handle } => Call::Unload(handle),
            });
        }
        self.hear(None)
    }

    pub(super) fn finish_call(&mut self) -> Result<(), String> {
        if self.calls.is_empty() {
            return self.orders();
        }
        let index = self.rng.random_range(0..self.calls.len());
        let call = self.calls.swap_remove(index);
        let Some(shard) = &mut self.shard else {
            return Err("a call outlived its epoch".to_owned());
        };
        match call {
            Call::Unload(handle) => {
                shard
                    .unload(handle)
                    .map_err(|breach| format!("{breach:?}"))?;
                self.seen.evictions += 1;
                self.scheduler.adapter_unloaded(handle);
            }
            Call::Load(id, handle) => {
                let folder = self
                    .folders
                    .get_mut(&id)
                    .ok_or("an unknown adapter is loaded")?;
                if self.troubled && self.rng.random_bool(0.1) {
                    self.seen.unanswered_loads += 1;
                    self.scheduler.adapter_load_failed(
                        self.now,
                        handle,
                        LoadFault::Unanswered,
                        "the shard is busy",
                    );
                } else if folder.broken || shard.adapter_bytes() + folder.bytes > self.adapter_bytes
                {
                    let fault = if folder.broken {
                        LoadFault::Unfit
                    } else {
                        LoadFault::NoRoom
                    };
                    self.scheduler
                        .adapter_load_failed(self.now, handle, fault, "it does not load");
                } else {
                    let adapter = kvrun_fake_shard::adapter::Adapter {
                        digest: folder.digest.clone(),
                        bytes: folder.bytes,
                        pages: folder.pages,
                        rank: 8,
                        targets: Vec::new(),
                    };
                    shard
                        .load(handle, adapter)
                        .map_err(|breach| format!("{breach:?}"))?;
                    folder.loaded = Some(folder.digest.clone());
                    let (digest, bytes, pages) = (&folder.digest, folder.bytes, folder.pages);
                    self.seen.too_large += u64::from(u64::from(pages) >= shard.pages());
                    self.scheduler
                        .adapter_loaded(self.now, handle, digest, bytes, pages);
                }
            }
        }
        self.orders()
    }
}
