//! Reads a list of adapters as it is written after `--lora-ids`.

use std::collections::HashSet;

use crate::failure::Failure;

/// One adapter that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterRequest {
    /// What clients call it.
    pub name: String,
    /// A folder or a repository.
    pub source: String,
    /// Branch, tag or commit of the repository.
    pub revision: Option<String>,
}

/// Splits a `;` or `,` list of `source`, `source@revision` or `name=` either. `is_folder` tells a folder from a
/// repository: a folder may have `@` in its path, and is called by its last part.
pub fn parse(list: &str, is_folder: impl Fn(&str) -> bool) -> Result<Vec<AdapterRequest>, Failure> {
    let entries = list
        .split([';', ','])
        .map(str::trim)
        .filter(|entry| !entry.is_empty());
    let requests = entries
        .map(|entry| parse_entry(entry, &is_folder))
        .collect::<Result<Vec<_>, _>>()?;
    let mut seen = HashSet::new();
    match requests.iter().find(|request| !seen.insert(&request.name)) {
        Some(twice) => Err(Failure::config(format!(
            "two adapters are called `{}`; name them apart, as in --lora-ids \"one={};two=...\"",
            twice.name, twice.source
        ))),
        None => Ok(requests),
    }
}

fn parse_entry(entry: &str, is_folder: &impl Fn(&str) -> bool) -> Result<AdapterRequest, Failure> {
    let (name, place) = match entry.split_once('=') {
        Some((name, place)) => (Some(name.trim()), place.trim()),
        None => (None, entry),
    };
    let (source, revision) = match place.rsplit_once('@') {
        Some((source, revision)) if !is_folder(place) => (source, Some(revision)),
        _ => (place, None),
    };
    let incomplete = source.is_empty() || name == Some("") || revision == Some("");
    if incomplete || source.contains('=') {
        return Err(Failure::config(format!(
            "`{entry}` in the list of adapters is incomplete; write a folder, a repository, repository@revision, or \
             name= before any of them"
        )));
    }
    let own_name = if is_folder(source) {
        last_part(source)
    } else {
        source
    };
    let name = name.unwrap_or(own_name).to_owned();
    Ok(AdapterRequest {
        name,
        source: source.to_owned(),
        revision: revision.map(str::to_owned),
    })
}

fn last_part(path: &str) -> &str {
    let trimmed = path.trim_end_matches('/');
    match trimmed.rsplit_once('/') {
        Some((_, last)) if !last.is_empty() && last != "." && last != ".." => last,
        _ => trimmed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(list: &str) -> Vec<(String, String, Option<String>)> {
        let folders = ["./poet", "/models/at@home", "poet"];
        let requests =
            parse(list, |path| folders.contains(&path.trim_end_matches('/'))).expect(list);
        requests
            .into_iter()
            .map(|request| (request.name, request.source, request.revision))
            .collect()
    }

    fn row(name: &str, source: &str, revision: Option<&str>) -> (String, String, Option<String>) {
        (name.into(), source.into(), revision.map(str::to_owned))
    }

    #[test]
    fn semicolons_and_commas_both_separate() {
        assert_eq!(read("org/a;org/b"), read(" org/a , org/b ; "));
        assert_eq!(
            read("org/a;org/b"),
            [row("org/a", "org/a", None), row("org/b", "org/b", None)]
        );
        assert!(read(" ;, ").is_empty());
    }

    #[test]
    fn names_and_revisions_are_read() {
        assert_eq!(read("org/a@v2"), [row("org/a", "org/a", Some("v2"))]);
        assert_eq!(read("math=org/a@v2"), [row("math", "org/a", Some("v2"))]);
        assert_eq!(read("math=./poet"), [row("math", "./poet", None)]);
    }

    #[test]
    fn a_folder_is_called_by_its_last_part_and_may_hold_an_at_sign() {
        assert_eq!(read("./poet/"), [row("poet", "./poet/", None)]);
        assert_eq!(
            read("/models/at@home"),
            [row("at@home", "/models/at@home", None)]
        );
    }

    #[test]
    fn an_incomplete_entry_or_a_name_used_twice_is_refused() {
        for list in [
            "=org/a",
            "name=",
            "org/a@",
            "@v1",
            "a=b=c",
            "org/a;org/a",
            "x=org/a;x=org/b",
        ] {
            assert!(parse(list, |_| false).is_err(), "{list}");
        }
    }
}
