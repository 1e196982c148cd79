//! Chat templates as models bring them, and as an attacker would.
#![allow(clippy::unwrap_used)]

use kvrun_text::{ChatTemplates, TemplateError};
use serde_json::json;

const LLAMA_3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}\
{% endif %}{% endfor %}";

fn templates(source: &str) -> ChatTemplates {
    let config = json!({"chat_template": source, "bos_token": "<s>", "eos_token": {"content": "</s>", "special": true}});
    ChatTemplates::new(&config.to_string(), None).unwrap()
}

fn render(source: &str, messages: serde_json::Value) -> Result<String, TemplateError> {
    templates(source).render(&messages, true, 1_709_211_909)
}

#[test]
fn a_llama_3_conversation() {
    let prompt = render(LLAMA_3, json!([{"role": "user", "content": " Hi "}])).unwrap();
    assert_eq!(
        prompt,
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    );
}

#[test]
fn what_the_template_refuses_is_told_in_its_words() {
    let both = json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]);
    let refused = render(MISTRAL, both).unwrap_err();
    assert_eq!(
        refused,
        TemplateError::Refused(
            "Conversation roles must alternate user/assistant/user/assistant/...".into()
        )
    );
    let fine = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    assert_eq!(render(MISTRAL, fine).unwrap(), "<s>[INST] a [/INST]b</s>");
}

#[test]
fn python_methods_dates_and_loop_controls_work() {
    let source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% if m.content.strip().startswith('x') %}{% continue %}\
                  {% endif %}|{{ m.get('content').upper() }}{% endfor %}";
    let messages = json!([{"role": "user", "content": " xa"}, {"role": "user", "content": "b"}]);
    assert_eq!(render(source, messages).unwrap(), "29 Feb 2024|B");
}

#[test]
fn tojson_writes_as_python_does() {
    let messages = json!([{"role": "user", "content": "<é&'>\n"}]);
    assert_eq!(
        render("{{ messages | tojson }}", messages.clone()).unwrap(),
        r#"[{"content": "<é&'>\n", "role": "user"}]"#
    );
    assert_eq!(
        render("{{ messages[0] | tojson(indent=2) }}", messages).unwrap(),
        "{\n  \"content\": \"<é&'>\\n\",\n  \"role\": \"user\"\n}"
    );
}

#[test]
fn training_marks_are_no_obstacle() {
    let source = "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}{% endfor %}";
    assert_eq!(render(source, json!([{"content": "a"}])).unwrap(), "a");
}

#[test]
fn endless_work_and_endless_output_are_cut() {
    let spin = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    assert_eq!(
        render(spin, json!([])).unwrap_err(),
        TemplateError::TooExpensive
    );
    let flood = "{% for a in range(9999) %}{{ messages[0].content }}{% endfor %}";
    let long = json!([{"content": "x".repeat(1000)}]);
    assert_eq!(
        render(flood, long).unwrap_err(),
        TemplateError::TooExpensive
    );
}

#[test]
fn a_template_cannot_reach_out() {
    for source in [
        "{% include '/etc/passwd' %}",
        "{{ open('/etc/passwd') }}",
        "{{ ''.__class__.__mro__[1] }}",
    ] {
        assert!(
            matches!(render(source, json!([])), Err(TemplateError::Failed(_))),
            "{source}"
        );
    }
}

#[test]
fn named_templates_and_the_jinja_file_are_found() {
    let config = json!({"chat_template": [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]});
    let named = ChatTemplates::new(&config.to_string(), None).unwrap();
    assert_eq!(named.render(&json!([]), true, 0).unwrap(), "A");
    let file = ChatTemplates::new(&config.to_string(), Some("C")).unwrap();
    assert_eq!(file.render(&json!([]), true, 0).unwrap(), "C");
}

#[test]
fn a_model_without_template_says_so() {
    let none = ChatTemplates::new("{}", None).unwrap();
    assert!(!none.exists());
    assert_eq!(
        none.render(&json!([]), true, 0).unwrap_err(),
        TemplateError::Missing
    );
}

#[test]
fn broken_and_oversized_sources_are_refused_at_load() {
    let broken = json!({"chat_template": "{% if %}"}).to_string();
    assert!(ChatTemplates::new(&broken, None).is_err());
    let huge = json!({"chat_template": "x".repeat(300_000)}).to_string();
    assert!(ChatTemplates::new(&huge, None).is_err());
}
