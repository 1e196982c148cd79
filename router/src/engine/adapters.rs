//! The adapter registry as handles see it: names, states and facts, mirrored from the scheduler after every turn.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvrun_proto::LoadedAdapter;
use kvrun_scheduler::{AdapterId, AdapterView, LoadFault, Residency, Scheduler};
use tokio::sync::{mpsc, oneshot};

use super::Command;
use crate::request::{AdapterInfo, AdapterSpec, AdapterState, LoadError, UnknownAdapter};

/// Names and facts of all adapters.
#[derive(Default)]
pub(super) struct Registry {
    inner: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    /// Names that new requests may use.
    names: HashMap<String, AdapterId>,
    all: BTreeMap<AdapterId, AdapterInfo>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The adapter that has a name now.
    pub(super) fn named(&self, name: &str) -> Option<AdapterInfo> {
        let entries = self.lock();
        let id = entries.names.get(name)?;
        entries.all.get(id).cloned()
    }

    /// One adapter by id.
    pub(super) fn get(&self, id: AdapterId) -> Option<AdapterInfo> {
        self.lock().all.get(&id).cloned()
    }

    /// Gives a name to a new adapter.
    pub(super) fn add(&self, id: AdapterId, spec: AdapterSpec) {
        let mut entries = self.lock();
        entries.names.insert(spec.name.clone(), id);
        let info = AdapterInfo {
            name: spec.name,
            id,
            path: spec.path,
            state: AdapterState::Known,
            digest: String::new(),
            bytes: 0,
            matched: 0,
            rank_min: 0,
            rank_max: 0,
            targets: Vec::new(),
            users: 0,
            pinned: spec.pinned,
            error: None,
        };
        entries.all.insert(id, info);
    }

    /// Takes a name from new requests.
    pub(super) fn withdraw(&self, name: &str) -> Option<AdapterInfo> {
        let mut entries = self.lock();
        let id = entries.names.remove(name)?;
        let info = entries.all.get_mut(&id)?;
        info.state = AdapterState::Draining;
        Some(info.clone())
    }

    /// What the shards said about a loaded adapter.
    pub(super) fn describe(&self, id: AdapterId, loaded: &LoadedAdapter) {
        if let Some(info) = self.lock().all.get_mut(&id) {
            info.matched = loaded.matched;
            info.rank_min = loaded.rank_min;
            info.rank_max = loaded.rank_max;
            info.targets.clone_from(&loaded.targets);
        }
    }

    /// Mirrors the scheduler; adapters it forgot are gone.
    pub(super) fn mirror(&self, scheduler: &Scheduler) {
        let mut entries = self.lock();
        entries
            .all
            .retain(|&id, info| match scheduler.adapters().get(id) {
                Some(view) => {
                    copy(view, info);
                    true
                }
                None => false,
            });
    }
}

fn copy(view: &AdapterView, info: &mut AdapterInfo) {
    info.state = match &view.residency {
        _ if view.leaving => AdapterState::Draining,
        Residency::Absent | Residency::Unloading { .. } => AdapterState::Known,
        Residency::Loading { .. } => AdapterState::Loading,
        Residency::Resident { .. } => AdapterState::Ready,
        Residency::Failed { .. } => AdapterState::Failed,
    };
    match (&view.residency, &info.error) {
        (Residency::Failed { reason, .. }, None) => info.error = Some(reason.clone()),
        (Residency::Failed { .. }, _) | (_, None) => {}
        _ => info.error = None,
    }
    if let Some(digest) = &view.digest
        && **digest != *info.digest
    {
        info.digest = digest.to_string();
    }
    info.bytes = if view.digest.is_some() { view.bytes } else { 0 };
    info.users = view.users;
    info.pinned = view.pinned;
}

/// How a waiting load ended, if it has.
pub(super) fn outcome(view: Option<&AdapterView>) -> Option<Result<(), LoadError>> {
    let Some(view) = view else {
        let text = "the adapter was unloaded while it was loading";
        return Some(Err(LoadError::Unavailable(text.to_owned())));
    };
    match &view.residency {
        Residency::Resident { .. } => Some(Ok(())),
        Residency::Failed { fault, reason } => Some(Err(match fault {
            LoadFault::Unfit => LoadError::Invalid(reason.clone()),
            LoadFault::Missing => LoadError::NotFound(reason.clone()),
            LoadFault::NoRoom => LoadError::NoRoom(reason.clone()),
            LoadFault::Unanswered => LoadError::Unavailable(reason.clone()),
        })),
        _ => None,
    }
}

/// The adapters of an engine. Cheap to clone.
#[derive(Clone)]
pub struct Adapters {
    commands: mpsc::UnboundedSender<Command>,
    registry: Arc<Registry>,
}

impl Adapters {
    pub(super) fn new(commands: mpsc::UnboundedSender<Command>) -> Self {
        Self {
            commands,
            registry: Arc::default(),
        }
    }

    pub(super) fn registry(&self) -> Arc<Registry> {
        self.registry.clone()
    }

    /// Finds a name that new requests may use. One whose last load failed is as good as unknown.
    pub fn resolve(&self, name: &str) -> Result<AdapterId, UnknownAdapter> {
        match self.registry.named(name) {
            Some(info) if info.state != AdapterState::Failed => Ok(info.id),
            _ => Err(UnknownAdapter(name.to_owned())),
        }
    }

    /// Every adapter, by name.
    pub fn list(&self) -> Vec<AdapterInfo> {
        let mut all: Vec<_> = self.registry.lock().all.values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name).then(a.id.cmp(&b.id)));
        all
    }

    /// One adapter by id, also while it drains.
    pub fn get(&self, id: AdapterId) -> Option<AdapterInfo> {
        self.registry.get(id)
    }

    /// Loads an adapter beside serving and waits for the outcome; again under the same name and folder is no error.
    pub async fn load(&self, spec: AdapterSpec) -> Result<AdapterInfo, LoadError> {
        let gone = || LoadError::Unavailable("the server is shutting down".to_owned());
        let (reply, answered) = oneshot::channel();
        let command = Command::Load(spec, reply);
        self.commands.send(command).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// Refuses new requests for the adapter at once; its bytes go when the last running one ends.
    pub async fn unload(&self, name: &str) -> Result<AdapterInfo, UnknownAdapter> {
        let unknown = || UnknownAdapter(name.to_owned());
        let (reply, answered) = oneshot::channel();
        let command = Command::Unload(name.to_owned(), reply);
        self.commands.send(command).map_err(|_| unknown())?;
        answered.await.map_err(|_| unknown())?
    }

    /// Exempts an adapter from eviction, or no longer.
    pub fn pin(&self, name: &str, pinned: bool) -> Result<AdapterInfo, UnknownAdapter> {
        let mut info = self
            .registry
            .named(name)
            .ok_or_else(|| UnknownAdapter(name.to_owned()))?;
        let _ = self.commands.send(Command::Pin(info.id, pinned));
        info.pinned = pinned;
        Ok(info)
    }
}
