//! Where an adapter asked for over HTTP may come from: beneath one folder, or the hub when that is allowed.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use super::app::Settings;
use super::error::{ApiError, Kind};

/// Longest time a download may take.
const DOWNLOAD: Duration = Duration::from_secs(600);

/// What a client named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A folder, as a path beneath the allowed one.
    Folder(String),
    /// A repository, maybe with `@revision`.
    Hub(String),
}

impl Origin {
    /// The last part of the path or the repository's name.
    pub fn default_name(&self) -> String {
        match self {
            Self::Folder(path) => {
                let last = Path::new(path).file_name();
                last.map(|name| name.to_string_lossy().into_owned())
                    .unwrap_or_default()
            }
            Self::Hub(id) => id.split('@').next().unwrap_or_default().to_owned(),
        }
    }

    /// The folder itself, fetched first where it has to be.
    pub async fn resolve(&self, settings: &Settings) -> Result<PathBuf, ApiError> {
        match self {
            Self::Folder(path) => folder(settings.lora_dir.as_deref(), path),
            Self::Hub(id) => download(settings, id).await,
        }
    }
}

/// The folder at `path` beneath `root`, symbolic links resolved; 403 for everything else.
pub fn folder(root: Option<&Path>, path: &str) -> Result<PathBuf, ApiError> {
    let forbidden = |message: &str| ApiError {
        param: Some("path".to_owned()),
        ..ApiError::new(Kind::Forbidden, message)
    };
    let root = root.ok_or_else(|| {
        forbidden("adapters cannot be loaded from folders here; start the server with --lora-dir to allow it")
    })?;
    if path.is_empty() || path.contains('\0') {
        return Err(forbidden(
            "`path` must name a folder of the server's adapter folder",
        ));
    }
    let outside =
        || forbidden("`path` leads outside the server's adapter folder, or to nothing in it");
    let root = root
        .canonicalize()
        .map_err(|_| forbidden("the server's adapter folder cannot be read"))?;
    // Not telling missing from outside: a stranger must not learn which files this machine has.
    let found = root.join(path).canonicalize().map_err(|_| outside())?;
    if found == root || !found.starts_with(&root) {
        return Err(outside());
    }
    if !found.is_dir() {
        return Err(forbidden(
            "`path` must name a folder, with adapter_config.json and safetensors in it",
        ));
    }
    Ok(found)
}

async fn download(settings: &Settings, id: &str) -> Result<PathBuf, ApiError> {
    if !settings.allow_dynamic_lora {
        return Err(ApiError {
            param: Some("id".to_owned()),
            ..ApiError::new(
                Kind::Forbidden,
                "adapters cannot be fetched from the hub here; start the server with --allow-dynamic-lora to allow it",
            )
        });
    }
    let (repository, revision) = repository(id)?;
    let mut command = Command::new(&settings.download_program);
    command.args([
        "download-weights",
        repository,
        "--revision",
        revision,
        "--json",
    ]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // A download that takes too long must not leave a process behind.
    command.kill_on_drop(true);
    let failed = |reason: &str| {
        ApiError::new(
            Kind::NotFound,
            format!("`{id}` could not be fetched: {reason}"),
        )
    };
    let output = match tokio::time::timeout(DOWNLOAD, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => {
            tracing::error!(%error, program = %settings.download_program.display(), "cannot start the download");
            return Err(failed("the download program is missing on this server"));
        }
        Err(_) => return Err(failed("it took too long; try again later")),
    };
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        tracing::warn!(repository, status = %output.status, stderr = %told.trim(), "download failed");
        return Err(failed(
            "the repository or revision is missing, private or not reachable; see the server's log",
        ));
    }
    fetched_folder(&output.stdout).ok_or_else(|| failed("the download gave no folder"))
}

/// Whether an id has the form of a repository, maybe with `@revision`.
pub fn is_repository(id: &str) -> bool {
    repository(id).is_ok()
}

/// `org/name` and the revision, with nothing in them that a program could take for an option or a path upwards.
fn repository(id: &str) -> Result<(&str, &str), ApiError> {
    let (repository, revision) = id.split_once('@').unwrap_or((id, "main"));
    let plain = |part: &str| {
        let letters = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        (1..=96).contains(&part.len())
            && part.chars().all(letters)
            && !part.starts_with(['-', '.'])
            && !part.contains("..")
    };
    let named = repository
        .split_once('/')
        .is_some_and(|(owner, name)| plain(owner) && plain(name));
    if named && plain(revision) {
        return Ok((repository, revision));
    }
    Err(ApiError::field(
        "id",
        "`id` must be `organisation/name` or `organisation/name@revision`",
    ))
}

/// The last line of the program's output says where the files are.
fn fetched_folder(stdout: &[u8]) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Fetched {
        path: PathBuf,
    }
    let text = std::str::from_utf8(stdout).ok()?;
    let line = text.lines().rfind(|line| !line.trim().is_empty())?;
    let folder = match serde_json::from_str::<Fetched>(line) {
        Ok(fetched) => fetched.path,
        Err(_) => PathBuf::from(line.trim().trim_matches('"')),
    };
    folder.is_dir().then_some(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_beneath_the_root_are_found() {
        let home = tempfile::tempdir().unwrap();
        let root = home.path().join("adapters");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::create_dir(home.path().join("secret")).unwrap();
        std::fs::write(root.join("file"), "").unwrap();
        std::os::unix::fs::symlink(home.path().join("secret"), root.join("link")).unwrap();
        std::os::unix::fs::symlink(root.join("a"), root.join("inner")).unwrap();
        let find = |path: &str| folder(Some(&root), path);
        assert!(find("a").is_ok() && find("a/b").is_ok() && find("inner").is_ok());
        assert!(find(root.join("a").to_str().unwrap()).is_ok());
        for path in [
            "",
            ".",
            "..",
            "../secret",
            "a/../..",
            "link",
            "file",
            "missing",
            "/etc",
            "a\0b",
        ] {
            assert_eq!(find(path).unwrap_err().kind, Kind::Forbidden, "{path}");
        }
        assert_eq!(folder(None, "a").unwrap_err().kind, Kind::Forbidden);
    }

    #[test]
    fn repositories_hold_no_options_and_no_paths() {
        assert_eq!(repository("org/name").unwrap(), ("org/name", "main"));
        assert_eq!(repository("org/name@v1.0").unwrap(), ("org/name", "v1.0"));
        for id in [
            "name",
            "--json/x",
            "org/--x",
            "../x",
            "org/..",
            "org/a/b",
            "org/x@--y",
            "org/x@",
            "o rg/x",
            "",
        ] {
            assert!(repository(id).is_err(), "{id}");
        }
    }

    #[test]
    fn the_download_says_where_the_files_are() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().display().to_string();
        let json = format!("loading\n{{\"path\": \"{path}\"}}\n");
        assert_eq!(fetched_folder(json.as_bytes()).unwrap(), home.path());
        assert_eq!(
            fetched_folder(format!("{path}\n").as_bytes()).unwrap(),
            home.path()
        );
        assert_eq!(fetched_folder(b"nowhere\n"), None);
    }
}
