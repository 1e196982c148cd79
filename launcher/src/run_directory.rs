//! The private folder of one instance: sockets and the files by which shards meet.

use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::failure::{Code, Failure};

/// A folder only this user may enter, under a name no other instance has. It is removed when this value goes.
#[derive(Debug)]
pub struct RunDirectory(PathBuf);

impl RunDirectory {
    /// Makes the folder beneath `parent`.
    pub fn create(parent: &Path) -> Result<Self, Failure> {
        // A Unix socket's path is at most 107 bytes; fall back to a short folder rather than fail in the shard.
        let parent = if parent.as_os_str().len() > 70 {
            Path::new("/tmp")
        } else {
            parent
        };
        loop {
            let path = parent.join(format!("kvrun-{:016x}", rand::random::<u64>()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                Err(error) => {
                    let path = parent.display();
                    let message = format!(
                        "no folder for sockets can be made in {path}: {error}; set TMPDIR to another place"
                    );
                    return Err(Failure::new(Code::Files, message));
                }
            }
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        let _gone_already = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn two_instances_never_share_a_folder_and_leave_none_behind() {
        let parent = tempfile::tempdir().expect("a folder");
        let (one, two) = (
            RunDirectory::create(parent.path()).expect("one"),
            RunDirectory::create(parent.path()).expect("two"),
        );
        assert_ne!(one.path(), two.path());
        let mode = fs::metadata(one.path())
            .expect("facts")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
        drop((one, two));
        assert_eq!(fs::read_dir(parent.path()).expect("a list").count(), 0);
    }
}
