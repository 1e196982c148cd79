//! Images in prompts, over a shard whose answers depend on every byte of them.
#![allow(clippy::unwrap_used)]

mod served;

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::future::join_all;
use kvrun_fake_shard::{FakeShard, Mark, tokens};
use kvrun_proto::image_rule::Layout;
use kvrun_proto::{FixedImage, ImageRule, ImageSize, Sampling, TiledImage};
use kvrun_router::images::ImageSettings;
use serde_json::{Value, json};
use served::{BOS, EOS, Served, Setup, serve, serve_with};

const MARKER: u32 = served::VOCABULARY;
const PART: u32 = MARKER + 1;
const VOCABULARY: u32 = MARKER + 2;

/// Ids of a picture of the fixed kind, between brackets.
const FEATURES: usize = 20;

fn rule() -> ImageRule {
    ImageRule {
        marker: "<image>".to_owned(),
        token: PART,
        text: "<<part>>".to_owned(),
        layout: Some(Layout::Fixed(FixedImage {
            features: FEATURES as u32,
        })),
        ..Default::default()
    }
}

fn takes(setup: &mut Setup, rule: ImageRule) {
    setup.shard.images = Some(rule);
    setup.shard.vocabulary = VOCABULARY;
    // The model's folder is there already; its tokenizer learns what stands for images.
    let home = setup.settings.lora_dir.as_ref().unwrap().parent().unwrap();
    let file = home.join("tokenizer.json");
    let mut tokenizer: Value =
        serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let special = |(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    tokenizer["added_tokens"]
        .as_array_mut()
        .unwrap()
        .extend([(MARKER, "<image>"), (PART, "<part>")].map(special));
    std::fs::write(file, tokenizer.to_string()).unwrap();
}

async fn seeing(rule: ImageRule) -> Served {
    serve_with(|setup| takes(setup, rule)).await
}

/// The head of a PNG file, and bytes that tell it from others.
fn png(height: u32, width: u32, rest: &[u8]) -> Vec<u8> {
    let head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".as_slice();
    [
        head,
        &width.to_be_bytes(),
        &height.to_be_bytes(),
        &[8, 2, 0, 0, 0],
        rest,
    ]
    .concat()
}

fn data_url(image: &[u8]) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(image))
}

/// A piece of a prompt.
enum Piece<'a> {
    Text(&'a str),
    Image(&'a [u8], usize),
}

/// The greedy answer to a prompt of pieces; images have so many ids, or those of the fixed kind.
fn answer(pieces: &[Piece<'_>], count: u32) -> Vec<u32> {
    let mut chain = tokens::extend(tokens::root(""), BOS);
    for piece in pieces {
        chain = match piece {
            Piece::Text(text) => text
                .bytes()
                .fold(chain, |chain, byte| tokens::extend(chain, u32::from(byte))),
            Piece::Image(image, 0) => {
                let seen = tokens::seen(image);
                let opened = tokens::extend(chain, u32::from(b'<'));
                let parts =
                    (0..FEATURES).fold(opened, |chain, _| tokens::extend_seen(chain, PART, seen));
                tokens::extend(parts, u32::from(b'>'))
            }
            Piece::Image(image, parts) => {
                let seen = tokens::seen(image);
                (0..*parts).fold(chain, |chain, _| tokens::extend_seen(chain, PART, seen))
            }
        };
    }
    tokens::answer_after(chain, &Sampling::default(), count, &[EOS], VOCABULARY)
}

fn body(inputs: String) -> Value {
    json!({"inputs": inputs, "parameters": {"max_new_tokens": 8, "details": true}})
}

fn chat(content: Value) -> Value {
    json!({"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8})
}

fn url_part(url: &str) -> Value {
    json!({"type": "image_url", "image_url": {"url": url}})
}

#[tokio::test(flavor = "multi_thread")]
async fn markdown_images_are_seen_and_counted() {
    let server = seeing(rule()).await;
    let (cat, dog) = (png(4, 4, b"cat"), png(9, 9, b"dog"));
    let text = format!("A ![]({}) and ![]({}).", data_url(&cat), data_url(&dog));
    let pieces = [
        Piece::Text("A "),
        Piece::Image(&cat, 0),
        Piece::Text(" and "),
        Piece::Image(&dog, 0),
        Piece::Text("."),
    ];
    let expected = server.text(&answer(&pieces, 8));
    let response = server
        .post("/generate", body(text.clone()))
        .send()
        .await
        .unwrap();
    let tokens = 1 + "A  and .".len() + 2 * (FEATURES + 2);
    assert_eq!(
        response.headers()["x-prompt-tokens"],
        tokens.to_string().as_str()
    );
    let (status, whole) = served::read(response).await;
    assert_eq!((status, &whole["generated_text"]), (200, &json!(expected)));
    let completion = json!({"prompt": text, "max_tokens": 8, "temperature": 0});
    let (_, completion) = server.ask("/v1/completions", completion).await;
    assert_eq!(completion["choices"][0]["text"], expected);
    assert_eq!(completion["usage"]["prompt_tokens"], tokens);
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_shows_images_in_their_places() {
    let server = seeing(rule()).await;
    let cat = png(4, 4, b"cat");
    let content = json!([{"type": "text", "text": "What is "}, url_part(&data_url(&cat)), {"type": "text", "text": "?"}]);
    let pieces = [
        Piece::Text("<user>What is "),
        Piece::Image(&cat, 0),
        Piece::Text("?<assistant>"),
    ];
    let (status, answered) = server.ask("/v1/chat/completions", chat(content)).await;
    assert_eq!(status, 200, "{answered}");
    let expected = server.text(&answer(&pieces, 8));
    assert_eq!(answered["choices"][0]["message"]["content"], expected);
    // Markdown in a chat is text, and an image model reads plain texts as well.
    let plain = "see ![](http://localhost/x.png)";
    let (_, answered) = server.ask("/v1/chat/completions", chat(json!(plain))).await;
    let pieces = format!("<user>{plain}<assistant>");
    let expected = server.text(&answer(&[Piece::Text(&pieces)], 8));
    assert_eq!(answered["choices"][0]["message"]["content"], expected);
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_reads_parts_only_is_given_parts() {
    let template = "{{ bos_token }}{% for m in messages %}{% for c in m.content | selectattr('type', 'equalto', 'image') %}\
        <image>{% endfor %}{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}{% endfor %}";
    let server = serve_with(|setup| {
        takes(setup, rule());
        let home = setup.settings.lora_dir.as_ref().unwrap().parent().unwrap();
        let json = json!({"chat_template": template}).to_string();
        std::fs::write(home.join("chat_template.json"), json).unwrap();
    })
    .await;
    let cat = png(4, 4, b"cat");
    let content = json!([{"type": "text", "text": "Who?"}, url_part(&data_url(&cat))]);
    let (status, answered) = server.ask("/v1/chat/completions", chat(content)).await;
    assert_eq!(status, 200, "{answered}");
    let expected = server.text(&answer(&[Piece::Image(&cat, 0), Piece::Text("Who?")], 8));
    assert_eq!(answered["choices"][0]["message"]["content"], expected);
    let (_, answered) = server
        .ask("/v1/chat/completions", chat(json!("Who?")))
        .await;
    let expected = server.text(&answer(&[Piece::Text("Who?")], 8));
    assert_eq!(answered["choices"][0]["message"]["content"], expected);
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tiled_image_is_counted_by_its_size() {
    let grid = |height, width| ImageSize { height, width };
    let tiled = TiledImage {
        tile_pixels: 28,
        tile_tokens: 2,
        grids: vec![grid(28, 56), grid(56, 28), grid(56, 56)],
    };
    let rule = ImageRule {
        text: "<part>".to_owned(),
        layout: Some(Layout::Tiled(tiled)),
        ..rule()
    };
    let server = seeing(rule).await;
    let wide = png(40, 70, b"wide");
    let (_, whole) = server
        .ask("/generate", body(format!("![]({})", data_url(&wide))))
        .await;
    assert_eq!(
        whole["generated_text"],
        server.text(&answer(&[Piece::Image(&wide, 14)], 8))
    );
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_image_shares_pages_and_another_shares_none_of_its_own() {
    for together in [false, true] {
        let server = seeing(ImageRule { together, ..rule() }).await;
        let (cat, dog) = (png(4, 4, b"cat"), png(4, 4, b"dog"));
        let ask = async |image: &[u8]| {
            let text = format!(
                "{}![]({}){}",
                "x".repeat(20),
                data_url(image),
                "y".repeat(40)
            );
            let (status, answer) = server.ask("/generate", body(text)).await;
            assert_eq!(status, 200, "{answer}");
            (
                answer["generated_text"].clone(),
                answer["details"]["cached_tokens"].as_u64().unwrap(),
            )
        };
        let (first, cached) = ask(&cat).await;
        assert_eq!(cached, 0);
        assert_eq!(
            ask(&cat).await,
            (first.clone(), 80),
            "83 tokens, five full pages"
        );
        let (other, cached) = ask(&dog).await;
        assert_ne!(other, first);
        // Positions 22 to 41 are the image; the page before it is shared, the one in which it begins is not.
        assert_eq!(cached, 16);
        server.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_prefix_does_not_end_within_an_image_whose_ids_see_each_other() {
    let ends = async |together: bool| {
        let server = seeing(ImageRule { together, ..rule() }).await;
        let image = data_url(&png(4, 4, b"cat"));
        // The image is at 22 to 41 and the prompt ends right behind it: pages of 16 end at 16 and at 32.
        let text = format!("{}![]({image})!", "x".repeat(20));
        server.ask("/generate", body(text.clone())).await;
        let (_, answer) = server.ask("/generate", body(text)).await;
        server.idle().await;
        answer["details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!((ends(false).await, ends(true).await), (32, 16));
}

#[tokio::test(flavor = "multi_thread")]
async fn images_and_their_memory_are_sent_again_after_the_death_of_a_shard() {
    let rule = ImageRule {
        memory: 21,
        together: true,
        ..rule()
    };
    let mut server = seeing(rule).await;
    server.shard.faults().step_delay(Duration::from_millis(2));
    let images: Vec<Vec<u8>> = (0..6u8).map(|tag| png(4, 4, &[tag; 9])).collect();
    for _ in 0..3 {
        let asked = images.iter().map(|image| {
            let text = format!(
                "see ![]({}) twice ![]({})",
                data_url(image),
                data_url(&images[0])
            );
            let body =
                json!({"inputs": text, "parameters": {"max_new_tokens": 60, "details": true}});
            server.post("/generate", body).send()
        });
        let asked = tokio::spawn(join_all(asked.collect::<Vec<_>>()));
        tokio::time::sleep(Duration::from_millis(40)).await;
        FakeShard::restart(&mut server.shard).unwrap();
        for (image, response) in images.iter().zip(asked.await.unwrap()) {
            let (status, whole) = served::read(response.unwrap()).await;
            let pieces = [
                Piece::Text("see "),
                Piece::Image(image, 0),
                Piece::Text(" twice "),
                Piece::Image(&images[0], 0),
            ];
            assert_eq!(
                (status, &whole["generated_text"]),
                (200, &json!(server.text(&answer(&pieces, 60))))
            );
        }
    }
    server.idle().await;
    let (_, info) = server.look("/info").await;
    assert_eq!((&info["images"], &info["off"]), (&json!(true), &json!({})));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_images_reads_markdown_as_text_and_refuses_parts() {
    let server = serve().await;
    let text = "![](http://localhost/x.png)";
    let (_, whole) = server.ask("/generate", body(text.to_owned())).await;
    let expected = server.greedy(&served::prompt_ids(text), "", 8);
    assert_eq!(whole["generated_text"], server.text(&expected));
    let (status, refused) = server
        .ask(
            "/v1/chat/completions",
            chat(json!([url_part("data:image/png;base64,AAAA")])),
        )
        .await;
    assert_eq!(status, 400);
    assert!(
        refused["error"]["message"]
            .as_str()
            .unwrap()
            .contains("reads text only")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_cannot_be_read_are_refused_with_the_reason() {
    let server = serve_with(|setup| {
        takes(
            setup,
            ImageRule {
                together: true,
                ..rule()
            },
        );
        setup.settings.images = ImageSettings {
            bytes: 4000,
            ..ImageSettings::default()
        };
        setup.settings.payload_limit = 1 << 20;
        setup.engine.step_tokens = 30;
    })
    .await;
    let good = data_url(&png(4, 4, b"x"));
    let cases = [
        (
            format!("![]({})", "data:image/png;base64,###"),
            "valid base64",
        ),
        (format!("![]({})", "data:image/png,AAAA"), "valid base64"),
        (
            format!("![]({})", data_url(b"GIF89")),
            "none of PNG, JPEG, WebP and GIF",
        ),
        (
            format!("![]({})", data_url(b"<svg/>")),
            "none of PNG, JPEG, WebP and GIF",
        ),
        (
            format!("![]({})", data_url(&png(100_000, 100_000, b""))),
            "100000 x 100000 pixels",
        ),
        (
            format!("![]({})", data_url(&png(4, 4, &[0; 5000]))),
            "more than 4000 bytes",
        ),
        (
            "![](https://example.com/x.png)".to_owned(),
            "--allow-remote-images",
        ),
        ("![](file:///etc/passwd)".to_owned(), "`https:` or `http:`"),
        ("![](x.png)".to_owned(), "`https:` or `http:`"),
        (format!("<image> ![]({good})"), "1 images and 2 places"),
        ("<image>".to_owned(), "0 images and 1 places"),
        (
            format!("![]({good})").repeat(17),
            "at most 16 images, 17 were sent",
        ),
        (format!("![]({good})").repeat(12), "at most 256 are allowed"),
    ];
    for (inputs, reason) in cases {
        let (status, refused) = server.ask("/generate", body(inputs)).await;
        let message = refused["error"].as_str().unwrap_or_default();
        assert!(
            status == 422 && message.contains(reason),
            "{reason}: {status} {refused}"
        );
    }
    let cut = json!({"inputs": format!("![]({good})"), "parameters": {"truncate": 4}});
    let (status, refused) = server.ask("/generate", cut).await;
    assert!(
        status == 422 && refused["error"].as_str().unwrap().contains("`truncate`"),
        "{refused}"
    );
    let (status, refused) = server
        .ask(
            "/v1/completions",
            json!({"prompt": [1, PART, 2], "max_tokens": 2}),
        )
        .await;
    assert!(
        status == 400
            && refused["error"]["message"]
                .as_str()
                .unwrap()
                .contains("0 images"),
        "{refused}"
    );
    let typed = json!([{"type": "text", "text": "<image>"}, url_part(&good)]);
    let (status, refused) = server.ask("/v1/chat/completions", chat(typed)).await;
    assert!(
        status == 400
            && refused["error"]["message"]
                .as_str()
                .unwrap()
                .contains("send images as parts"),
        "{refused}"
    );
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_the_shard_cannot_read_is_refused_before_the_first_byte() {
    let server = seeing(rule()).await;
    let error = "bad_image: the image cannot be read: broken data";
    server
        .shard
        .faults()
        .mark(PART, Mark::RowError(error.to_owned()));
    let url = data_url(&png(4, 4, b"x"));
    let streamed = |mut body: Value| {
        body["stream"] = json!(true);
        body
    };
    let (plain, parts) = (body(format!("![]({url})")), chat(json!([url_part(&url)])));
    for (route, body, expected) in [
        ("/generate", plain.clone(), 422),
        ("/generate_stream", plain.clone(), 422),
        ("/", streamed(plain), 422),
        ("/v1/chat/completions", parts.clone(), 400),
        ("/v1/chat/completions", streamed(parts), 400),
    ] {
        let (status, refused) = server.ask(route, body).await;
        let message = match expected {
            422 => {
                assert_eq!(refused["error_type"], "validation");
                &refused["error"]
            }
            _ => &refused["error"]["message"],
        };
        assert_eq!(
            (status, message.as_str().unwrap()),
            (expected, "the image cannot be read: broken data"),
            "{route}"
        );
    }
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_beside_each_other_share_their_border() {
    let rule = ImageRule {
        text: "|<part>|".to_owned(),
        border: "|".to_owned(),
        ..rule()
    };
    let server = seeing(rule).await;
    let url = data_url(&png(4, 4, b"x"));
    let tokens = async |text: String| {
        let response = server.post("/generate", body(text)).send().await.unwrap();
        let found = response.headers()["x-prompt-tokens"].to_str().unwrap();
        found.parse::<usize>().unwrap()
    };
    assert_eq!(
        tokens(format!("![]({url})![]({url})")).await,
        1 + 2 * FEATURES + 3
    );
    assert_eq!(
        tokens(format!("![]({url}) ![]({url})")).await,
        1 + 2 * FEATURES + 5
    );
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_larger_than_a_step_is_refused_where_it_must_not_be_cut() {
    for (together, expected) in [(true, 422), (false, 200)] {
        let server = serve_with(|setup| {
            takes(setup, ImageRule { together, ..rule() });
            setup.engine.step_tokens = 19;
        })
        .await;
        let inputs = format!("![]({})", data_url(&png(4, 4, b"x")));
        let (status, answer) = server.ask("/generate", body(inputs)).await;
        assert_eq!(status, expected, "{answer}");
        if together {
            let message = answer["error"].as_str().unwrap();
            assert!(message.contains("--max-batch-prefill-tokens"), "{message}");
        }
        server.idle().await;
    }
}
