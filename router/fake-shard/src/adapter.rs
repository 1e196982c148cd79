//! Adapter folders as the fake sees them: a digest over the files, their size, and what the config says.

use sha2::{Digest, Sha256};
use std::path::Path;
use tonic::Status;

/// An adapter that the fake holds.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Hex SHA-256 over the names and bytes of its files.
    pub digest: String,
    /// Bytes of its weights.
    pub bytes: u64,
    /// Adjacent pages that it is placed in; 0 = none.
    pub pages: u32,
    /// `r` of its config.
    pub rank: u32,
    /// `target_modules` of its config.
    pub targets: Vec<String>,
}

/// Reads a folder. NOT_FOUND without one, INVALID_ARGUMENT without a readable `adapter_config.json` or weights.
pub fn read(path: &Path) -> Result<Adapter, Status> {
    let invalid = |what: &str| Status::invalid_argument(format!("{}: {what}", path.display()));
    let mut files: Vec<_> = std::fs::read_dir(path)
        .map_err(|error| Status::not_found(format!("{}: {error}", path.display())))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|file| file.is_file())
        .collect();
    files.sort();
    let (mut hash, mut bytes, mut config) = (Sha256::new(), 0, None);
    for file in files {
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let content = std::fs::read(&file).map_err(|error| invalid(&format!("{name}: {error}")))?;
        hash.update(name.as_bytes());
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(&content);
        if name == "adapter_config.json" {
            config = serde_json::from_slice::<serde_json::Value>(&content).ok();
        } else if name.ends_with(".safetensors") {
            bytes += content.len() as u64;
        }
    }
    let config = config.ok_or_else(|| invalid("no readable adapter_config.json"))?;
    if bytes == 0 {
        return Err(invalid("no .safetensors file with weights"));
    }
    Ok(Adapter {
        digest: format!("{:x}", hash.finalize()),
        bytes,
        pages: 0,
        rank: config["r"].as_u64().unwrap_or(8) as u32,
        targets: config["target_modules"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|target| target.as_str().map(str::to_owned))
            .collect(),
    })
}
