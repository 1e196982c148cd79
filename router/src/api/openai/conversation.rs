//! From the messages of a conversation to the prompt that the model's template makes of them.

use serde_json::{Value, json};

use super::fields::unix_seconds;
use super::types::{ChatMessage, Content};
use crate::api::App;
use crate::api::error::ApiError;
use crate::api::request::Prompt;
use crate::api::validate::unsupported;

/// A part of what a message says.
enum Part<'a> {
    Text(&'a str),
    Image(&'a str),
}

/// How a template is handed what a message says: some know texts only, others read lists of parts only.
#[derive(Clone, Copy)]
enum Style<'a> {
    /// One text, with this marker in the place of each image.
    Joined(&'a str),
    /// A list of parts.
    Parts,
}

/// The prompt for messages, with its images where the model takes them.
pub fn conversation(app: &App, messages: &[ChatMessage]) -> Result<Prompt, ApiError> {
    let said = messages.iter().map(parts).collect::<Result<Vec<_>, _>>()?;
    let model = app.engine.status().description;
    let Some(rule) = model.as_ref().and_then(|model| model.images.as_ref()) else {
        if said
            .iter()
            .flatten()
            .any(|part| matches!(part, Part::Image(_)))
        {
            let why = "a content part has type `image_url` and this model reads text only";
            return Err(unsupported("messages", why));
        }
        return Ok(Prompt::Text {
            text: render(app, messages, &said, Style::Joined(""))?,
            // The template wrote the model's own tokens already.
            add_special: false,
        });
    };
    let images = said.iter().flatten().filter_map(|part| match part {
        Part::Image(url) => Some((*url).to_owned()),
        Part::Text(_) => None,
    });
    let urls: Vec<String> = images.collect();
    let text = marked(app, messages, &said, &rule.marker, urls.len())?;
    Ok(Prompt::Marked { text, urls })
}

/// What a template makes of a list when it expects a text.
const LISTED: &str = "[{\"type\": \"";

/// A template that reads only texts writes parts out as data, one that reads only parts makes nothing of texts; which of
/// both a model's is shows in what comes out.
fn marked(
    app: &App,
    messages: &[ChatMessage],
    said: &[Vec<Part<'_>>],
    marker: &str,
    images: usize,
) -> Result<String, ApiError> {
    let typed = |part: &Part<'_>| matches!(part, Part::Text(text) if text.contains(marker));
    if said.iter().flatten().any(typed) {
        let message = format!(
            "`messages` hold the text `{marker}`, which stands for an image; send images as parts"
        );
        return Err(ApiError::field("messages", message));
    }
    let last = last_text(said);
    let fits = |text: &&String| text.matches(marker).count() == images;
    let joined = render(app, messages, said, Style::Joined(marker));
    let of_texts = joined.as_ref().ok().filter(fits);
    if let Some(text) = of_texts.filter(|text| text.contains(last)) {
        return Ok(text.clone());
    }
    let parts = render(app, messages, said, Style::Parts);
    let of_parts = parts.as_ref().ok().filter(fits);
    let of_parts = of_parts.filter(|text| text.contains(last) && !text.contains(LISTED));
    match of_parts.or(of_texts) {
        Some(text) => Ok(text.clone()),
        None => {
            joined?;
            let message = format!(
                "`messages` have {images} images and the model's chat template does not make a place for each; send the \
                 prompt to /generate"
            );
            Err(ApiError::field("messages", message))
        }
    }
}

/// The last text of a conversation, as far as a template must leave it alone.
fn last_text<'a>(said: &[Vec<Part<'a>>]) -> &'a str {
    let mut texts = said.iter().flatten().rev().filter_map(|part| match part {
        Part::Text(text) => Some(text.trim()),
        Part::Image(_) => None,
    });
    texts.next().unwrap_or_default()
}

fn render(
    app: &App,
    messages: &[ChatMessage],
    said: &[Vec<Part<'_>>],
    style: Style<'_>,
) -> Result<String, ApiError> {
    let message = |(message, parts): (&ChatMessage, &Vec<Part<'_>>)| {
        let mut value = json!({"role": message.role, "content": content(parts, style)});
        if let Some(name) = &message.name {
            value["name"] = Value::from(name.as_str());
        }
        value
    };
    let values: Vec<Value> = messages.iter().zip(said).map(message).collect();
    Ok(app
        .templates
        .render(&Value::Array(values), true, unix_seconds())?)
}

fn content(parts: &[Part<'_>], style: Style<'_>) -> Value {
    match style {
        Style::Joined(marker) => {
            let texts = parts.iter().map(|part| match part {
                Part::Text(text) => *text,
                Part::Image(_) => marker,
            });
            Value::from(texts.collect::<String>())
        }
        Style::Parts => {
            let values = parts.iter().map(|part| match part {
                Part::Text(text) => json!({"type": "text", "text": text}),
                Part::Image(_) => json!({"type": "image"}),
            });
            Value::Array(values.collect())
        }
    }
}

fn parts(message: &ChatMessage) -> Result<Vec<Part<'_>>, ApiError> {
    let calls = message.tool_calls.as_ref();
    if calls.is_some_and(|calls| !super::chat::is_nothing(calls)) {
        let why = "conversations cannot hold tool calls yet";
        return Err(unsupported("tool_calls", why));
    }
    match &message.content {
        Some(Content::Text(text)) => Ok(vec![Part::Text(text)]),
        Some(Content::Parts(parts)) => parts.iter().map(part).collect(),
        None => {
            let error = format!(
                "a message of role `{}` has no `content`; send a text",
                message.role
            );
            Err(ApiError::field("messages", error))
        }
    }
}

fn part(part: &Value) -> Result<Part<'_>, ApiError> {
    let lacks = |what: &str| ApiError::field("messages", format!("a content part of type {what}"));
    match part.get("type").and_then(Value::as_str) {
        Some("text") => {
            refuse_others(part, &["type", "text"])?;
            let text = part.get("text").and_then(Value::as_str).map(Part::Text);
            text.ok_or_else(|| lacks("`text` has no `text`; send a string"))
        }
        Some("image_url") => {
            refuse_others(part, &["type", "image_url"])?;
            let image = part.get("image_url").unwrap_or(&Value::Null);
            refuse_others(image, &["url", "detail"])?;
            let url = image.get("url");
            let image = url.and_then(Value::as_str).map(Part::Image);
            image.ok_or_else(|| lacks("`image_url` has no `image_url.url`; send a string"))
        }
        kind => {
            let why = format!(
                "a content part has type `{}`, only `text` and `image_url` are known",
                kind.unwrap_or("none")
            );
            Err(unsupported("messages", &why))
        }
    }
}

/// Refuses what a part says beyond these fields, unless it is null.
fn refuse_others(part: &Value, fields: &[&str]) -> Result<(), ApiError> {
    let members = part.as_object().into_iter().flatten();
    let mut others =
        members.filter(|(name, value)| !value.is_null() && !fields.contains(&name.as_str()));
    match others.next() {
        Some((name, _)) => {
            let message = format!(
                "a content part has the unknown field `{name}`, known are {fields:?}; leave it out"
            );
            Err(ApiError::field("messages", message))
        }
        None => Ok(()),
    }
}
