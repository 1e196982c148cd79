//! What the surroundings say beside the flags: read once, here.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

/// Variables that model processes inherit: by name, or by what the name begins with.
///
/// A list of what is let through, so that a token under any name stays outside.
const FORWARDED_TO_SHARDS: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_*",
    "TZ",
    "TMPDIR",
    "SHELL",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONUNBUFFERED",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONFAULTHANDLER",
    "PYTHONWARNINGS",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "XDG_RUNTIME_DIR",
    "XDG_CACHE_HOME",
    "LOG_LEVEL",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "KVRUN_*",
    "OMP_*",
    "GOMP_*",
    "KMP_*",
    "MKL_*",
    "DNNL_*",
    "ONEDNN_*",
    "ATEN_*",
    "TORCH_*",
    "PYTORCH_*",
    "TORCHINDUCTOR_*",
    "TRITON_*",
    "CUDA_*",
    "NVIDIA_*",
    "NCCL_*",
    "GLOO_*",
    "FLASHINFER_*",
    "MALLOC_*",
    "GLIBC_TUNABLES",
    "NUMEXPR_*",
];

/// Second names of some variables, and the flag each stands for when neither the flag nor its own variable is set:
/// text-generation-inference's older ones, and those of hosting platforms.
pub(super) const OTHER_NAMES: &[(&str, &str)] = &[
    ("HOSTNAME", "hostname"),
    ("LORA_ADAPTERS", "lora_ids"),
    ("MAX_INPUT_LENGTH", "max_input_tokens"),
    ("HF_MODEL_ID", "model_id"),
    ("HF_MODEL_REVISION", "revision"),
    ("HF_MODEL_QUANTIZE", "quantize"),
    ("SM_NUM_GPUS", "num_shard"),
];

/// Whether a model process may see the variable.
pub fn is_forwarded_to_shards(name: &str) -> bool {
    // A secret stays out even under an allowed prefix.
    let secret = ["TOKEN", "SECRET", "PASSWORD", "API_KEY"]
        .iter()
        .any(|word| name.contains(word));
    !secret
        && FORWARDED_TO_SHARDS
            .iter()
            .any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => name == *pattern,
            })
}

/// The launcher's surroundings.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// All variables, for the children.
    pub variables: Vec<(OsString, OsString)>,
    /// This program, which also starts each child (see `trampoline`).
    pub program: PathBuf,
    /// Folder of the sibling programs.
    pub programs: PathBuf,
    /// Folder in which the run directory is made.
    pub runtime: PathBuf,
    /// An address from HOSTNAME, if it is one.
    pub hostname: Option<String>,
}

impl Environment {
    /// Reads the process's own environment.
    pub fn read() -> Self {
        let variables: Vec<_> = std::env::vars_os().collect();
        let program = std::env::current_exe().unwrap_or_default();
        Self::from_variables(variables, program)
    }

    /// The same from a given list.
    pub fn from_variables(variables: Vec<(OsString, OsString)>, program: PathBuf) -> Self {
        let get = |name: &str| {
            let found = variables
                .iter()
                .find(|(key, value)| key == name && !value.is_empty());
            found.map(|(_, value)| value.clone())
        };
        let beside = program.parent().map(PathBuf::from).unwrap_or_default();
        Self {
            programs: get("KVRUN_BIN_DIR").map_or(beside, PathBuf::from),
            runtime: get("XDG_RUNTIME_DIR")
                .map(PathBuf::from)
                .filter(|path| path.is_dir())
                .unwrap_or_else(|| {
                    get("TMPDIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from)
                }),
            hostname: get("HOSTNAME")
                .and_then(|name| name.into_string().ok())
                .filter(|name| name == "localhost" || name.parse::<IpAddr>().is_ok()),
            program,
            variables,
        }
    }

    /// The value of a variable, unless it is empty.
    pub fn get(&self, name: &str) -> Option<String> {
        let found = self
            .variables
            .iter()
            .find(|(key, value)| key == name && !value.is_empty());
        found.and_then(|(_, value)| value.clone().into_string().ok())
    }
}

#[cfg(test)]
impl Environment {
    /// That of a launcher in /opt/bin with these variables.
    pub fn of(pairs: &[(&str, &str)]) -> Self {
        let variables = pairs.iter().map(|(key, value)| (key.into(), value.into()));
        let program = PathBuf::from("/opt/bin/text-generation-launcher");
        Self::from_variables(variables.collect(), program)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_s_name_is_no_address() {
        assert_eq!(
            Environment::of(&[("HOSTNAME", "4f1c2d9e8a")]).hostname,
            None
        );
        assert_eq!(
            Environment::of(&[("HOSTNAME", "0.0.0.0")])
                .hostname
                .as_deref(),
            Some("0.0.0.0")
        );
        assert_eq!(
            Environment::of(&[("HOSTNAME", "::1")]).hostname.as_deref(),
            Some("::1")
        );
    }

    #[test]
    fn shards_see_no_secret_under_any_name() {
        for name in [
            "HF_TOKEN",
            "API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "OPENAI_API_KEY",
            "KVRUN_TOKEN",
            "GH",
            "MODEL_ID",
        ] {
            assert!(!is_forwarded_to_shards(name), "{name}");
        }
        for name in [
            "PATH",
            "OMP_NUM_THREADS",
            "KVRUN_KERNELS",
            "LC_ALL",
            "CUDA_VISIBLE_DEVICES",
        ] {
            assert!(is_forwarded_to_shards(name), "{name}");
        }
    }

    #[test]
    fn siblings_lie_beside_the_program() {
        assert_eq!(Environment::of(&[]).programs, PathBuf::from("/opt/bin"));
        assert_eq!(
            Environment::of(&[("KVRUN_BIN_DIR", "/x")]).programs,
            PathBuf::from("/x")
        );
    }
}
