//! The private folder of one instance: sockets and the files by which shards meet.

use std::fs::{self, DirBuilder, File};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;

use crate::failure::{Code, Failure};

const PREFIX: &str = "kvrun-";
const LOCK: &str = "lock";
/// A younger folder may belong to an instance that has not locked it yet.
const YOUNG: Duration = Duration::from_secs(60);

/// A folder only this user may enter, under a name no other instance has. It is removed when this value goes.
pub struct RunDirectory {
    path: PathBuf,
    /// Held while the instance lives; the kernel lets go of it however the instance ends.
    _lock: Flock<File>,
}

impl RunDirectory {
    /// Makes the folder beneath `parent`, and removes those there whose instance was killed.
    pub fn create(parent: &Path) -> Result<Self, Failure> {
        // A Unix socket's path is at most 107 bytes; fall back to a short folder rather than fail in the shard.
        let parent = if parent.as_os_str().len() > 70 {
            Path::new("/tmp")
        } else {
            parent
        };
        sweep(parent, YOUNG);
        Self::make(parent).map_err(|error| {
            let path = parent.display();
            let message = format!(
                "no folder for sockets can be made in {path}: {error}; set TMPDIR to another place"
            );
            Failure::new(Code::Files, message)
        })
    }

    fn make(parent: &Path) -> Result<Self, Error> {
        let path = loop {
            let path = parent.join(format!("{PREFIX}{:016x}", rand::random::<u64>()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => break path,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        };
        let lock = lock(&path, File::create(path.join(LOCK))?)?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        let _gone_already = fs::remove_dir_all(&self.path);
    }
}

fn lock(path: &Path, file: File) -> Result<Flock<File>, Error> {
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        Error::new(
            ErrorKind::WouldBlock,
            format!("{} is locked by another: {error}", path.display()),
        )
    })
}

/// Removes this user's folders beneath `parent` that are older than `young` and that nobody holds.
fn sweep(parent: &Path, young: Duration) {
    let folders = fs::read_dir(parent).into_iter().flatten().flatten();
    let ours = folders.filter(|folder| folder.file_name().to_string_lossy().starts_with(PREFIX));
    for path in ours.map(|folder| folder.path()) {
        let is_left = fs::symlink_metadata(&path).is_ok_and(|facts| {
            let age = facts.modified().ok().and_then(|time| time.elapsed().ok());
            facts.is_dir()
                && facts.uid() == Uid::effective().as_raw()
                && age.is_some_and(|age| age >= young)
        });
        if !is_left {
            continue;
        }
        // Without a lock file it is no folder of an instance.
        if let Ok(_held) = File::open(path.join(LOCK)).and_then(|file| lock(&path, file)) {
            let _another_was_faster = fs::remove_dir_all(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn count(parent: &Path) -> usize {
        fs::read_dir(parent).expect("a list").count()
    }

    #[test]
    fn two_instances_never_share_a_folder_and_leave_none_behind() {
        let parent = tempfile::tempdir().expect("a folder");
        let one = RunDirectory::create(parent.path()).expect("one");
        let two = RunDirectory::create(parent.path()).expect("two");
        assert_ne!(one.path(), two.path());
        let mode = fs::metadata(one.path())
            .expect("facts")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
        drop((one, two));
        assert_eq!(count(parent.path()), 0);
    }

    #[test]
    fn what_a_killed_instance_left_is_removed_and_what_lives_is_not() {
        let parent = tempfile::tempdir().expect("a folder");
        let living = RunDirectory::create(parent.path()).expect("an instance");
        let left = parent.path().join("kvrun-0000000000000000");
        fs::create_dir(&left).expect("a folder");
        fs::write(left.join(LOCK), "").expect("a lock");
        fs::create_dir(parent.path().join("kvrun-of-someone-else")).expect("a folder");
        sweep(parent.path(), YOUNG);
        assert_eq!(count(parent.path()), 3);
        sweep(parent.path(), Duration::ZERO);
        assert_eq!(count(parent.path()), 2);
        assert!(living.path().exists() && !left.exists());
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let failure = RunDirectory::create(Path::new("/proc"))
            .err()
            .expect("no folder in /proc");
        assert!(
            failure.code == Code::Files && failure.message.contains("/proc"),
            "{failure}"
        );
    }
}
