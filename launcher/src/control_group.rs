//! The control groups that bound this process: where the files of their limits lie.

use std::path::{Path, PathBuf};

/// The generation of control groups that rules a resource. Their files have different names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    One,
    Two,
}

/// The folders of this process's group and of all above it, its own first, as `controller` sees them. `root` is
/// `/sys/fs/cgroup`, `own` the text of `/proc/self/cgroup`. A container sees its own group as the root, so that some
/// of the folders may not be there.
pub fn folders(root: &Path, own: &str, controller: &str) -> (Version, Vec<PathBuf>) {
    let groups: Vec<(&str, &str)> = own
        .lines()
        .filter_map(|line| line.split_once(':')?.1.split_once(':'))
        .collect();
    let path_of = |is_it: &dyn Fn(&str) -> bool| {
        let found = groups.iter().find(|(controllers, _)| is_it(controllers));
        found.map(|(_, path)| *path)
    };
    let (version, base, path) =
        match path_of(&|controllers| controllers.split(',').any(|name| name == controller)) {
            Some(path) => (Version::One, root.join(controller), path),
            None => {
                let path = path_of(&str::is_empty).unwrap_or("/");
                (Version::Two, root.to_owned(), path)
            }
        };
    let levels = Path::new(path.trim_start_matches('/')).ancestors();
    (version, levels.map(|level| base.join(level)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_of_version_1_rules_where_it_is_named() {
        let root = Path::new("/g");
        let found = |own, controller| {
            let (version, folders) = folders(root, own, controller);
            let folders: Vec<_> = folders.iter().map(|f| f.display().to_string()).collect();
            (version, folders.join(" "))
        };
        let hybrid = "4:cpu,cpuacct:/pod/app\n1:name=systemd:/x\n0::/unified\n";
        assert_eq!(
            found(hybrid, "cpu"),
            (Version::One, "/g/cpu/pod/app /g/cpu/pod /g/cpu/".to_owned())
        );
        assert_eq!(
            found(hybrid, "memory"),
            (Version::Two, "/g/unified /g/".to_owned())
        );
        assert_eq!(
            found("0::/a:b\n", "cpu"),
            (Version::Two, "/g/a:b /g/".to_owned())
        );
        assert_eq!(found("", "cpu"), (Version::Two, "/g/".to_owned()));
    }
}
