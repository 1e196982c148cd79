//! Finds the files of the model and the adapters, downloads what is not here, and reads their headers.
//!
//! Both are the work of `text-generation-server`, which knows the hub's library and the file formats; its messages
//! are passed on as they come.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use crate::args::Environment;
use crate::commands::{self, Invocation, Served};
use crate::failure::{Code, Failure};
use crate::inspection::Inspection;
use crate::process::{Output, Spawner};
use crate::settings::Settings;
use crate::signals::Signals;

/// What the work needs to start a process and to be interrupted.
pub struct Work<'a> {
    pub environment: &'a Environment,
    pub settings: &'a Settings,
    /// Model processes.
    pub shards: u32,
    pub spawner: &'a Spawner<'a>,
    pub signals: &'a Signals,
}

impl Work<'_> {
    /// The folders of the model and of every adapter: downloaded if they are names of repositories, made if they are GGUF files.
    pub fn served(&self) -> Result<Served, Failure> {
        let settings = self.settings;
        let model = self.folder(
            "--model-id",
            &settings.model_id,
            settings.revision.as_deref(),
        )?;
        let adapters = settings.adapters.iter().map(|adapter| {
            let folder = self.folder("--lora-ids", &adapter.source, adapter.revision.as_deref())?;
            Ok((adapter.name.clone(), folder))
        });
        Ok(Served {
            model,
            adapters: adapters.collect::<Result<_, _>>()?,
        })
    }

    /// What the headers of all files say.
    pub fn inspection(&self, served: &Served) -> Result<Inspection, Failure> {
        let shards = self.shards.to_string();
        let dtype = self.settings.dtype.name();
        let kv_dtype = self.settings.kv_cache_dtype.name();
        let quantize = self.settings.quantize.map(|format| format.name());
        let adapters = commands::adapter_list(served);
        let mut args: Vec<&OsStr> =
            vec!["inspect".as_ref(), served.model.as_ref(), "--json".as_ref()];
        args.extend([
            OsStr::new("--dtype"),
            dtype.as_ref(),
            "--kv-cache-dtype".as_ref(),
            kv_dtype.as_ref(),
            "--world-size".as_ref(),
            shards.as_ref(),
        ]);
        if !adapters.is_empty() {
            args.extend([OsStr::new("--lora"), &adapters]);
        }
        if let Some(format) = &quantize {
            args.extend([OsStr::new("--quantize"), format.as_ref()]);
        }
        let text = self.answer(
            "inspect",
            &commands::server(self.environment, self.settings, &args),
        )?;
        serde_json::from_str(&text).map_err(|error| {
            Failure::system("text-generation-server inspect answered what this launcher cannot read; install both from one wheel", error)
        })
    }

    fn folder(&self, flag: &str, source: &str, revision: Option<&str>) -> Result<PathBuf, Failure> {
        let path = Path::new(source);
        let blocks = is_gguf(path);
        if path.is_dir() && !blocks {
            return std::path::absolute(path).map_err(|error| Failure::system(source, error));
        }
        if !blocks && !is_repository(source) {
            return Err(Failure::new(
                Code::Files,
                format!(
                    "{flag} {source}: there is no such folder or GGUF file, and it is not the name of a repository either; check the path"
                ),
            ));
        }
        let mut args: Vec<OsString> = vec!["download-weights".into(), source.into()];
        args.extend(
            revision
                .into_iter()
                .flat_map(|revision| ["--revision".into(), revision.into()]),
        );
        let args: Vec<_> = args.iter().map(OsString::as_os_str).collect();
        let text = self.answer(
            "download",
            &commands::server(self.environment, self.settings, &args),
        )?;
        let folder = text
            .lines()
            .map(str::trim)
            .rfind(|line| !line.is_empty())
            .map(PathBuf::from);
        folder.filter(|folder| folder.is_dir()).ok_or_else(|| {
            Failure::system(
                format!("the download of {source}"),
                "text-generation-server named no folder; install both from one wheel",
            )
        })
    }

    /// Runs a program to its end and returns what it wrote.
    fn answer(&self, name: &str, invocation: &Invocation) -> Result<String, Failure> {
        let mut process = self.spawner.spawn(name, invocation, &[], Output::Taken)?;
        let (sender, text) = mpsc::channel();
        if let Some(mut pipe) = process.take_output() {
            thread::spawn(move || {
                let mut bytes = Vec::new();
                let _truncated = pipe.read_to_end(&mut bytes);
                let _receiver_gone = sender.send(String::from_utf8_lossy(&bytes).into_owned());
            });
        }
        let ending = loop {
            if let Some(ending) = process.reap() {
                break ending;
            }
            if self.signals.wait(None, None)?.stop.is_some() {
                return Err(Failure::new(
                    Code::Stopped,
                    "stopped before anything was served",
                ));
            }
        };
        if ending.is_success() {
            return Ok(text.recv().unwrap_or_default());
        }
        // The program has said why, line by line, in the log. Its lines are drained before ours is written.
        let said = process.last_lines(1);
        let reason = if said.is_empty() {
            ending.describe()
        } else {
            "see above".to_owned()
        };
        Err(Failure::new(
            ending.permanent().unwrap_or(Code::Bug),
            format!("{name} failed: {reason}"),
        ))
    }
}

/// Whether a path is a GGUF file, or a folder whose only weights are such files: what is made a model folder of first.
fn is_gguf(path: &Path) -> bool {
    let ends = |path: &Path, name: &str| path.extension().is_some_and(|kind| kind == name);
    if path.is_file() {
        return ends(path, "gguf");
    }
    let Ok(entries) = path.read_dir() else {
        return false;
    };
    let files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.iter().any(|file| ends(file, "gguf"))
        && !files.iter().any(|file| ends(file, "safetensors"))
}

/// Whether the text has the shape of a repository's name: `name` or `owner/name`, of plain characters, perhaps with a
/// colon and a part of the name of one of its GGUF files.
fn is_repository(text: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let (name, file) = match text.split_once(':') {
        Some((name, file)) => (name, Some(file)),
        None => (text, None),
    };
    let fits = name.len() <= 96 && name.split('/').count() <= 2 && name.split('/').all(plain);
    fits && file.is_none_or(plain)
}

#[cfg(test)]
mod tests {
    use super::is_repository;

    #[test]
    fn a_path_is_no_repository() {
        for name in [
            "gpt2",
            "meta-llama/Llama-3.2-1B",
            "bigscience/bloom-560m",
            "org/m-GGUF:Q4_K_M",
        ] {
            assert!(is_repository(name), "{name}");
        }
        for path in [
            "",
            "/models/m",
            "./m",
            "../m",
            "a/b/c",
            "a b",
            "-x/y",
            "m/",
            "~/m",
            "org/m@v1",
            "org/m:",
            "org/m:a/b",
            "C:/m",
        ] {
            assert!(!is_repository(path), "{path}");
        }
    }
}
