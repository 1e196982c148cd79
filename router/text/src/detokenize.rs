//! Text from tokens as they come.
//!
//! A token's text depends on its neighbours: a character may be spread over several tokens, and a leading space shows
//! only after another token. So each new token is decoded together with a window of earlier ones, and what the window
//! alone gave is cut off in front. Joined, all pieces and the last flush are the decoding of the whole answer, byte for
//! byte.

use std::sync::Arc;

use crate::tokenizer::Tokenizer;

/// Turns the tokens of one answer into pieces of text that never split a character. Special tokens give no text.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Tokens of the window: those whose text is out but still shapes what follows, then those still held.
    window: Vec<u32>,
    /// How many tokens of the window are out.
    read: usize,
    /// The text of those.
    context: String,
}

impl Detokenizer {
    /// Starts an answer. Prompts have no part in it: an answer decodes as if it stood alone.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            tokenizer,
            window: Vec::new(),
            read: 0,
            context: String::new(),
        }
    }

    /// Takes the next token and gives the text that is certain now, maybe none.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        self.window.push(id);
        // A run of byte tokens decodes as a whole: one bad byte turns all of them into replacement characters.
        if self.tokenizer.is_byte_fallback(id) {
            return String::new();
        }
        let text = self.tokenizer.decode(&self.window, true);
        // A trailing replacement character may be the first bytes of a character whose rest is still to come.
        if text.ends_with('\u{fffd}') {
            return String::new();
        }
        let Some(fresh) = text.strip_prefix(self.context.as_str()) else {
            return String::new();
        };
        if fresh.is_empty() {
            return String::new();
        }
        let fresh = fresh.to_owned();
        self.window.drain(..self.read);
        self.read = self.window.len();
        self.context = self.tokenizer.decode(&self.window, true);
        fresh
    }

    /// Gives what is still held back, incomplete characters as replacement characters.
    pub fn flush(&mut self) -> String {
        if self.read == self.window.len() {
            return String::new();
        }
        let text = self.tokenizer.decode(&self.window, true);
        self.read = self.window.len();
        let fresh = text
            .get(self.context.len()..)
            .unwrap_or_default()
            .to_owned();
        self.context = text;
        fresh
    }

    /// Whether tokens wait for others before they have text.
    pub fn holds(&self) -> bool {
        self.read < self.window.len()
    }
}
