//! Keys of the prefix cache: each page's key is a hash over everything that its content depends on.

use crate::span::Span;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};

/// SHA-256 over model, adapter, tenant salt and every token and image up to a page's end.
///
/// Two pages have one key exactly when their K/V must be equal, so a page can never serve another adapter's prompt, and
/// a page whose parent was evicted is right again once the parent is back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub [u8; 32]);

impl Key {
    /// The key before the first page of a sequence.
    pub fn root(model_digest: &str, adapter_digest: &str, salt: &str) -> Self {
        let mut hash = Sha256::new();
        for part in [model_digest, adapter_digest, salt] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        Self(hash.finalize().into())
    }

    /// The same before a long sequence: positions turn its keys in another way.
    pub fn of_long(self) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        hash.update(b"long");
        Self(hash.finalize().into())
    }

    /// The key of the next page, which holds `tokens`, some of them out of `images`.
    pub fn then<'a>(
        &self,
        tokens: impl Iterator<Item = u32>,
        images: impl Iterator<Item = &'a Span>,
    ) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        // Every image's ids are alike: only its digest and its place tell what the page holds of it.
        for image in images {
            hash.update(image.start.to_le_bytes());
            hash.update(image.digest);
        }
        Self(hash.finalize().into())
    }
}

/// Which page holds which key. One page per key, one key per page.
#[derive(Debug, Default)]
pub struct PrefixIndex {
    // Looked up, never iterated for a decision, so the order of the map cannot leak into a plan.
    page_of: HashMap<Key, u32, BuildHasherDefault<DefaultHasher>>,
    key_of: Vec<Option<Key>>,
}

impl PrefixIndex {
    /// An empty index over pages `0..count`.
    pub fn new(count: u32) -> Self {
        Self {
            page_of: HashMap::default(),
            key_of: vec![None; count as usize],
        }
    }

    /// The page published under a key.
    pub fn get(&self, key: &Key) -> Option<u32> {
        self.page_of.get(key).copied()
    }

    /// Whether the page is published.
    pub fn holds(&self, page: u32) -> bool {
        self.key_of[page as usize].is_some()
    }

    /// Publishes a page, unless it or the key is published already.
    pub fn insert(&mut self, page: u32, key: Key) {
        if !self.holds(page) && !self.page_of.contains_key(&key) {
            self.page_of.insert(key, page);
            self.key_of[page as usize] = Some(key);
        }
    }

    /// Withdraws a page.
    pub fn forget(&mut self, page: u32) {
        if let Some(key) = self.key_of[page as usize].take() {
            self.page_of.remove(&key);
        }
    }

    /// Checks that both directions agree.
    pub fn audit(&self) -> Result<(), String> {
        let published = self.key_of.iter().flatten().count();
        if published != self.page_of.len() {
            return Err(format!(
                "{published} pages published, {} keys known",
                self.page_of.len()
            ));
        }
        let wrong = self
            .page_of
            .iter()
            .find(|(key, page)| self.key_of[**page as usize] != Some(**key));
        match wrong {
            Some((_, page)) => Err(format!("page {page} is published under another key")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_tells_model_adapter_tenant_and_tokens_apart() {
        let of = |model, adapter, salt, tokens: &[u32]| {
            Key::root(model, adapter, salt).then(tokens.iter().copied(), [].iter())
        };
        let base = of("m", "a", "s", &[1, 2]);
        assert_eq!(base, of("m", "a", "s", &[1, 2]));
        for other in [
            of("n", "a", "s", &[1, 2]),
            of("m", "b", "s", &[1, 2]),
            of("m", "a", "t", &[1, 2]),
            of("ma", "", "s", &[1, 2]),
            of("m", "a", "s", &[2, 1]),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn the_first_page_under_a_key_stays() {
        let mut index = PrefixIndex::new(2);
        let key = Key::root("m", "", "");
        index.insert(0, key);
        index.insert(1, key);
        assert_eq!((index.get(&key), index.holds(1)), (Some(0), false));
        index.forget(0);
        assert_eq!(index.get(&key), None);
        index.audit().unwrap();
    }
}
