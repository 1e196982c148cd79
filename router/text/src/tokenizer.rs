//! One model's tokenizer, read from `tokenizer.json`. Pooling and streaming live elsewhere.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use tokenizers::Tokenizer as Inner;

/// `tokenizer.json` could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the tokenizer {}: {reason}; the model folder needs a `tokenizer.json`", path.display())]
pub struct LoadError {
    /// The file that was asked for.
    pub path: PathBuf,
    /// What went wrong.
    pub reason: String,
}

/// Ids of a text, and where each one came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Start and end of each token in the text, in characters; empty for added special tokens.
    pub offsets: Vec<(usize, usize)>,
}

/// Maps text to token ids and back.
pub struct Tokenizer {
    inner: Inner,
    special: HashSet<u32>,
    byte_fallback: HashSet<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `folder`.
    pub fn load(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join("tokenizer.json");
        match Inner::from_file(&path) {
            Ok(inner) => Ok(Self::new(inner)),
            Err(error) => Err(LoadError {
                path,
                reason: error.to_string(),
            }),
        }
    }

    /// Wraps a tokenizer; truncation and padding that it may ask for are switched off.
    pub fn new(mut inner: Inner) -> Self {
        inner.with_padding(None);
        // Switching truncation off has no case that fails.
        let _ = inner.with_truncation(None);
        let special = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| id)
            .collect();
        let byte_fallback = byte_fallback_ids(&inner);
        Self {
            inner,
            special,
            byte_fallback,
        }
    }

    /// Token ids of `text`, with the model's own leading and trailing tokens when `add_special`.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Encoded, String> {
        let encoding = self
            .inner
            .encode_char_offsets(text, add_special)
            .map_err(|error| error.to_string())?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
        })
    }

    /// The text of `ids`; special tokens are left out when `skip_special`. Ids without a token give no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).unwrap_or_default()
    }

    /// The text of one token standing alone, special ones included.
    pub fn token_text(&self, id: u32) -> String {
        if self.is_special(id) {
            self.inner.id_to_token(id).unwrap_or_default()
        } else {
            self.decode(&[id], false)
        }
    }

    /// Whether an id is a control token that has no place in the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The id of a token by its exact name, e.g. "</s>".
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Number of ids, added tokens included. The model's logits may be wider.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether an id stands for one raw byte of a run that only has a meaning as a whole.
    pub(crate) fn is_byte_fallback(&self, id: u32) -> bool {
        self.byte_fallback.contains(&id)
    }
}

/// Ids of `<0x00>` to `<0xFF>` where the decoder joins them to characters.
fn byte_fallback_ids(inner: &Inner) -> HashSet<u32> {
    let joins = inner
        .get_decoder()
        .and_then(|decoder| serde_json::to_string(decoder).ok())
        .is_some_and(|json| json.contains("\"ByteFallback\""));
    if !joins {
        return HashSet::new();
    }
    (0..=255u8)
        .filter_map(|byte| inner.token_to_id(&format!("<0x{byte:02X}>")))
        .collect()
}
