//! From a prompt as it was sent to what the model reads: ids, and for an encoder its source.

use std::sync::Arc;

use kvrun_proto::ImageRule;
use kvrun_text::EncodeError;

use super::App;
use super::error::ApiError;
use super::images::{self, Shown};
use super::request::{Names, Prompt};
use crate::request::{Image, Refusal, Status};

/// Bytes of text per allowed token that are still tokenized; longer texts are refused unread.
const BYTES_PER_TOKEN: usize = 8;

/// How long sequences may be right now, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Prompt and answer together; for a model with an encoder, the answer and the id that it follows.
    pub total: u32,
    /// The prompt.
    pub input: u32,
    /// Ids are below this.
    pub vocabulary: u32,
    /// The id that answers follow, when an encoder reads the prompt.
    pub decoder_start: Option<u32>,
}

impl Limits {
    /// Limits of the serving epoch, or 503 where there is none.
    pub fn of(status: &Status, max_input_tokens: Option<u32>) -> Result<Self, ApiError> {
        let (Some(description), true) = (&status.description, status.max_total_tokens > 1) else {
            return Err(Refusal::NotReady.into());
        };
        let longest = match description.decoder_start {
            None => status.max_total_tokens - 1,
            Some(_) => longest_source(status, description.positions),
        };
        Ok(Self {
            total: status.max_total_tokens,
            input: max_input_tokens.map_or(longest, |limit| limit.min(longest)),
            vocabulary: description.vocabulary,
            decoder_start: description.decoder_start,
        })
    }

    /// Most bytes of a prompt that are looked at.
    pub fn bytes(&self) -> usize {
        (self.input as usize).saturating_mul(BYTES_PER_TOKEN)
    }

    /// The longest prompt that a request may be cut to.
    pub fn longest(&self) -> u32 {
        match self.decoder_start {
            None => self.total - 1,
            Some(_) => self.input,
        }
    }
}

/// An encoder reads its source in one step, which also computes the answer's first row, and its memory leaves at least a
/// page of the pool to the answer.
fn longest_source(status: &Status, positions: u32) -> u32 {
    let pool = status
        .pages
        .saturating_sub(1)
        .saturating_mul(status.page_tokens);
    let positions = if positions == 0 { u32::MAX } else { positions };
    let step = status.step_tokens.saturating_sub(1);
    step.min(pool).min(positions)
}

/// What a prompt became.
#[derive(Debug, Default)]
pub struct Encoded {
    /// Ids before the answer.
    pub ids: Arc<[u32]>,
    /// What an encoder reads.
    pub source: Arc<[u32]>,
    /// Images among the ids.
    pub images: Arc<[Image]>,
    /// Tokens that the model reads beside the ids.
    pub memory_tokens: u32,
    /// The prompt as text, as sent; empty when it came as ids.
    pub text: String,
}

impl Encoded {
    /// How many tokens the answer may have.
    pub fn answer_length(
        &self,
        asked: Option<i64>,
        default: Option<u32>,
        limits: Limits,
        names: Names,
    ) -> Result<u32, ApiError> {
        let prompt = self.ids.len();
        let room = limits
            .total
            .saturating_sub(u32::try_from(prompt).unwrap_or(u32::MAX));
        let Some(asked) = asked else {
            return Ok(default.map_or(room, |default| default.min(room)));
        };
        if let Some(asked) = u32::try_from(asked).ok().filter(|&asked| asked <= room) {
            return Ok(asked);
        }
        let Names {
            prompt: field,
            max_new_tokens,
            ..
        } = names;
        let message = match self.source.is_empty() {
            true => format!(
                "`{field}` has {prompt} tokens and `{max_new_tokens}` asks for {asked} more, together at most {} are \
                 allowed; ask for at most {room}",
                limits.total
            ),
            false => format!(
                "`{max_new_tokens}` asks for {asked} tokens and an answer has at most {room}; ask for fewer"
            ),
        };
        Err(ApiError::field(max_new_tokens, message))
    }
}

/// How a prompt is read.
#[derive(Clone, Copy)]
pub struct Reading<'a> {
    /// How long it may be.
    pub limits: Limits,
    /// Keeps so many ids at its end.
    pub truncate: Option<i64>,
    /// How images become ids, where the model takes them.
    pub images: Option<&'a ImageRule>,
    /// What the dialect calls the prompt.
    pub field: &'static str,
}

/// Reads a prompt.
pub async fn read(app: &App, prompt: Prompt, how: Reading<'_>) -> Result<Encoded, ApiError> {
    let Reading { limits, field, .. } = how;
    let (sent, text, add_special, urls) = match (prompt, how.images) {
        (Prompt::Text { text, add_special }, Some(rule)) => {
            let (marked, urls) = images::from_markdown(&text, &rule.marker);
            (text, marked, add_special, urls)
        }
        (Prompt::Text { text, add_special }, None) => (text.clone(), text, add_special, vec![]),
        // The template wrote the model's own tokens already.
        (Prompt::Marked { text, urls }, _) => (text.clone(), text, false, urls),
        (Prompt::Ids(ids), rule) => {
            let ids = check_ids(&ids, limits, field)?;
            if let Some(rule) = rule {
                images::refuse_places(app, rule, &ids, field)?;
            }
            return finish(ids, vec![], String::new(), how);
        }
    };
    if how.truncate.is_some() && !urls.is_empty() {
        let message = "`truncate` could cut an image in two; leave it out";
        return Err(ApiError::field("truncate", message));
    }
    let Some(rule) = how.images else {
        let ids = tokenize(app, &text, add_special, 0, how).await?;
        return finish(ids, vec![], sent, how);
    };
    let loaded = images::load(app, &urls, field).await?;
    let shown = Shown::new(app, rule, &text, loaded, field)?;
    let added = shown.text().len().saturating_sub(text.len());
    let ids = tokenize(app, shown.text(), add_special, added, how).await?;
    let (ids, images) = shown.place(&ids)?;
    finish(ids, images, sent, how)
}

fn finish(
    mut ids: Vec<u32>,
    images: Vec<Image>,
    text: String,
    how: Reading<'_>,
) -> Result<Encoded, ApiError> {
    let Reading { limits, field, .. } = how;
    if let Some(keep) = how.truncate.and_then(|keep| usize::try_from(keep).ok()) {
        ids.drain(..ids.len().saturating_sub(keep));
    }
    check_length(&ids, limits, field)?;
    let looked_at = how.images.map_or(0, |rule| rule.memory) * images.len() as u32;
    Ok(match limits.decoder_start {
        None => Encoded {
            ids: ids.into(),
            images: images.into(),
            memory_tokens: looked_at,
            text,
            ..Encoded::default()
        },
        Some(start) => Encoded {
            ids: Arc::from([start]),
            memory_tokens: ids.len() as u32,
            source: ids.into(),
            text,
            ..Encoded::default()
        },
    })
}

/// The ids of a text of which `added` bytes are not the client's.
async fn tokenize(
    app: &App,
    text: &str,
    add_special: bool,
    added: usize,
    how: Reading<'_>,
) -> Result<Vec<u32>, ApiError> {
    let Reading { limits, field, .. } = how;
    if text.is_empty() {
        let message = format!("`{field}` is empty; send at least one character");
        return Err(ApiError::field(field, message));
    }
    let most = limits.bytes() + added;
    let read = match how.truncate {
        Some(_) => end_of(text, most),
        None => text,
    };
    let refuse = |error: EncodeError| ApiError {
        message: format!("`{field}`: {error} (at most {} tokens)", limits.input),
        ..ApiError::from(error)
    };
    let encoded = app
        .text
        .encode(read.to_owned(), add_special, most)
        .await
        .map_err(refuse)?;
    let kept = how.truncate.and_then(|keep| usize::try_from(keep).ok());
    if read.len() < text.len() && kept.is_some_and(|kept| encoded.ids.len() <= kept) {
        return Err(refuse(EncodeError::TooLong {
            bytes: text.len(),
            limit: most,
        }));
    }
    // The tokenizer may know more ids than the model has logits for.
    match encoded.ids.iter().find(|&&id| id >= limits.vocabulary) {
        Some(id) => Err(outside(field, i64::from(*id), limits.vocabulary)),
        None => Ok(encoded.ids),
    }
}

/// The last characters of a text, `bytes` bytes at most. Only the end of a text that is truncated is kept, so no more of it
/// needs to be tokenized.
fn end_of(text: &str, bytes: usize) -> &str {
    let from = text.len().saturating_sub(bytes);
    let mut starts = from..=text.len();
    let end = starts.find_map(|start| text.get(start..));
    end.unwrap_or_default()
}

fn check_length(ids: &[u32], limits: Limits, field: &str) -> Result<(), ApiError> {
    if ids.is_empty() {
        let message = format!("`{field}` gives no tokens; send at least one");
        return Err(ApiError::field(field, message));
    }
    if ids.len() > limits.input as usize {
        let message = format!(
            "`{field}` has {} tokens and at most {} are allowed; shorten it or set `truncate`",
            ids.len(),
            limits.input
        );
        return Err(ApiError::field(field, message));
    }
    Ok(())
}

fn check_ids(ids: &[i64], limits: Limits, field: &str) -> Result<Vec<u32>, ApiError> {
    ids.iter()
        .map(|&id| {
            u32::try_from(id)
                .ok()
                .filter(|&id| id < limits.vocabulary)
                .ok_or_else(|| outside(field, id, limits.vocabulary))
        })
        .collect()
}

fn outside(field: &str, id: i64, vocabulary: u32) -> ApiError {
    let message = format!(
        "`{field}` holds token id {id}; ids of this model are 0 to {}",
        vocabulary.saturating_sub(1)
    );
    ApiError::field(field, message)
}
