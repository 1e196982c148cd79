//! Chat templates: the model's own Jinja source, rendered in a sandbox without files, clock or network.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Deserialize;
use serde_json::ser::{Formatter, PrettyFormatter};

use crate::strftime::strftime;

const FUEL: u64 = 1_000_000;
const SOURCE_BYTES: usize = 256 * 1024;
const OUTPUT_BYTES: usize = 4 * 1024 * 1024;
const DEPTH: usize = 64;

/// A conversation was not turned into a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The model brings no template.
    #[error("this model has no chat template; send a plain prompt to /generate or /v1/completions")]
    Missing,
    /// The template itself refuses the conversation.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// Rendering costs more than is allowed.
    #[error(
        "the model's chat template did not finish on these messages; send fewer or shorter ones"
    )]
    TooExpensive,
    /// The template is broken, or needs what is not there.
    #[error("the model's chat template fails on these messages: {0}")]
    Failed(String),
}

/// A model's chat templates could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the chat template in {file} is unusable: {reason}")]
pub struct LoadError {
    file: String,
    reason: String,
}

/// The chat template of a model, and its named variants.
pub struct ChatTemplates {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

#[derive(Deserialize, Default)]
struct TokenizerConfig {
    chat_template: Option<Source>,
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Source {
    One(String),
    Named(Vec<NamedSource>),
}

#[derive(Deserialize)]
struct NamedSource {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenName {
    Plain(String),
    Described { content: String },
}

impl TokenName {
    fn into_text(self) -> String {
        match self {
            Self::Plain(text) | Self::Described { content: text } => text,
        }
    }
}

impl ChatTemplates {
    /// Reads `chat_template.jinja`, or the template in `chat_template.json` that models with images have, and
    /// `tokenizer_config.json` in `folder`; a model may have none of them.
    pub fn load(folder: &Path) -> Result<Self, LoadError> {
        let config_file = folder.join("tokenizer_config.json");
        let config = match std::fs::read_to_string(&config_file) {
            Ok(json) => json,
            Err(_) => "{}".to_owned(),
        };
        let jinja = std::fs::read_to_string(folder.join("chat_template.jinja")).ok();
        let jinja = jinja.or_else(|| of_processor(folder));
        Self::new(&config, jinja.as_deref())
    }

    /// Compiles templates from the text of `tokenizer_config.json` and, if present, `chat_template.jinja`, which wins.
    pub fn new(tokenizer_config: &str, jinja: Option<&str>) -> Result<Self, LoadError> {
        let unusable = |file: &str, reason: String| LoadError {
            file: file.to_owned(),
            reason,
        };
        let config: TokenizerConfig = serde_json::from_str(tokenizer_config)
            .map_err(|error| unusable("tokenizer_config.json", error.to_string()))?;
        let mut sources = BTreeMap::new();
        match config.chat_template {
            Some(Source::One(template)) => {
                sources.insert("default".to_owned(), template);
            }
            Some(Source::Named(named)) => {
                sources.extend(
                    named
                        .into_iter()
                        .map(|source| (source.name, source.template)),
                );
            }
            None => {}
        }
        if let Some(template) = jinja {
            sources.insert("default".to_owned(), template.to_owned());
        }
        let mut environment =
            sandbox().map_err(|error| unusable("the sandbox", error.to_string()))?;
        for (name, source) in sources {
            if source.len() > SOURCE_BYTES {
                let reason = format!(
                    "`{name}` has {} bytes, the limit is {SOURCE_BYTES}",
                    source.len()
                );
                return Err(unusable("the model folder", reason));
            }
            environment
                .add_template_owned(name, without_training_marks(&source))
                .map_err(|error| unusable("the model folder", error.to_string()))?;
        }
        let text = |token: Option<TokenName>| token.map(TokenName::into_text).unwrap_or_default();
        Ok(Self {
            environment,
            bos: text(config.bos_token),
            eos: text(config.eos_token),
        })
    }

    /// Whether the model brings a template for plain conversations.
    pub fn exists(&self) -> bool {
        self.environment.get_template("default").is_ok()
    }

    /// The prompt for `messages` (a list of `{role, content}`), ending where the assistant is to go on when
    /// `add_generation_prompt`. `unix_seconds` is what the template sees as the present.
    pub fn render(
        &self,
        messages: &serde_json::Value,
        add_generation_prompt: bool,
        unix_seconds: u64,
    ) -> Result<String, TemplateError> {
        let template = self
            .environment
            .get_template("default")
            .map_err(|_| TemplateError::Missing)?;
        let now = move |format: String| strftime(&format, unix_seconds);
        let context = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.clone(),
            eos_token => self.eos.clone(),
            strftime_now => Value::from_function(now),
        };
        let mut output = Bounded(Vec::new());
        template
            .render_captured_to(context, &mut output)
            .map_err(|error| classify(&error))?;
        String::from_utf8(output.0).map_err(|error| TemplateError::Failed(error.to_string()))
    }
}

fn of_processor(folder: &Path) -> Option<String> {
    let text = std::fs::read_to_string(folder.join("chat_template.json")).ok()?;
    let json: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(json.get("chat_template")?.as_str()?.to_owned())
}

fn sandbox() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(DEPTH);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, Error> {
            Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("{RAISED}{message}"),
            ))
        },
    );
    environment.add_filter("tojson", tojson);
    Ok(environment)
}

/// Marks errors that the template raised on purpose; no text of ours begins so.
const RAISED: &str = "\u{1}";

fn classify(error: &Error) -> TemplateError {
    if error.kind() == ErrorKind::OutOfFuel || error.kind() == ErrorKind::WriteFailure {
        return TemplateError::TooExpensive;
    }
    match error
        .detail()
        .and_then(|detail| detail.strip_prefix(RAISED))
    {
        Some(message) => TemplateError::Refused(message.to_owned()),
        None => TemplateError::Failed(error.to_string()),
    }
}

/// Some models mark the assistant's part for training. The marks are no Jinja: comments with the same whitespace rules
/// take their place.
fn without_training_marks(source: &str) -> String {
    let mut source = source.to_owned();
    for tag in ["generation", "endgeneration"] {
        for (open, close) in [("", ""), ("-", ""), ("", "-"), ("-", "-")] {
            source = source.replace(
                &format!("{{%{open} {tag} {close}%}}"),
                &format!("{{#{open} {close}#}}"),
            );
        }
    }
    source
}

/// `json.dumps` as Python writes it: a space after separators, nothing escaped for HTML, keys in the order given.
fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            let spaces = vec![b' '; width.min(16)];
            let mut writer = serde_json::Serializer::with_formatter(
                &mut out,
                PrettyFormatter::with_indent(&spaces),
            );
            serde::Serialize::serialize(&value, &mut writer)
        }
        None => {
            let mut writer = serde_json::Serializer::with_formatter(&mut out, Spaced);
            serde::Serialize::serialize(&value, &mut writer)
        }
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(out)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// Output that refuses to grow beyond [`OUTPUT_BYTES`].
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES {
            return Err(std::io::Error::other("the prompt is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
