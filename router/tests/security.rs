//! Keys, limits and boundaries of the HTTP side.
#![allow(clippy::unwrap_used)]

mod served;

use std::time::{Duration, Instant};

use kvrun_router::api::auth::Keys;
use serde_json::{Value, json};
use served::{serve, serve_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Routes that are open without a key, as method and path.
const OPEN: [(&str, &str); 5] = [
    ("get", "/"),
    ("get", "/health"),
    ("get", "/livez"),
    ("get", "/readyz"),
    ("get", "/ping"),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_route_but_the_health_checks_needs_a_key() {
    let server = serve_with(|setup| setup.settings.keys = Keys::new(["one", "two"])).await;
    let document = server
        .get("/api-doc/openapi.json")
        .bearer_auth("one")
        .send()
        .await
        .unwrap();
    let document: Value = document.json().await.unwrap();
    let mut walked = vec![];
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            walked.push((
                method.clone(),
                path.replace("{name}", "x").replace("{model}", "x"),
            ));
        }
    }
    assert!(walked.len() > 20, "{walked:?}");
    walked.extend([
        ("get".to_owned(), "/docs/".to_owned()),
        ("get".to_owned(), "/api-doc/openapi.json".to_owned()),
    ]);
    for (method, path) in walked {
        let ask = |key: Option<&'static str>| {
            let method = method.to_uppercase().parse().unwrap();
            let request = server
                .client
                .request(method, format!("{}{path}", server.url))
                .json(&json!({}));
            match key {
                Some(key) => request.header("authorization", key),
                None => request,
            }
        };
        if OPEN.contains(&(method.as_str(), path.as_str())) {
            assert_eq!(
                ask(None).send().await.unwrap().status(),
                200,
                "{method} {path}"
            );
            continue;
        }
        for key in [
            None,
            Some("Bearer three"),
            Some("Bearer ONE"),
            Some("Bearer "),
            Some("one"),
            Some("Basic one"),
        ] {
            let refused = ask(key).send().await.unwrap();
            assert_eq!(refused.status(), 401, "{method} {path} {key:?}");
            assert_eq!(refused.headers()["www-authenticate"], "Bearer");
        }
        for key in ["Bearer one", "Bearer two", "bearer one"] {
            assert_ne!(
                ask(Some(key)).send().await.unwrap().status(),
                401,
                "{method} {path}"
            );
        }
    }
    let refused = server
        .post("/v1/completions", json!({"prompt": "Hi"}))
        .send()
        .await
        .unwrap();
    assert_eq!(
        served::read(refused).await.1["error"]["type"],
        "authentication_error"
    );
}

/// Routes that change what is served, as method, path and body.
fn administration() -> [(&'static str, &'static str, Value); 5] {
    [
        (
            "POST",
            "/v1/adapters",
            json!({"name": "cold", "path": "cold"}),
        ),
        ("POST", "/v1/adapters/cold/pin", json!({})),
        ("POST", "/v1/adapters/cold/unpin", json!({})),
        ("DELETE", "/v1/adapters/cold", json!({})),
        ("POST", "/download_lora_adapter", json!({"lora_id": "warm"})),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn where_there_is_an_admin_key_others_change_no_adapter() {
    for keys in [Keys::new(["plain"]), Keys::default()] {
        let open = keys.is_open();
        let server = serve_with(|setup| {
            setup.settings.keys = keys;
            setup.settings.admin_keys = Keys::new(["boss"]);
        })
        .await;
        let ask = async |key: Option<&str>, method: &str, path: &str, body: &Value| {
            let url = format!("{}{path}", server.url);
            let request = server
                .client
                .request(method.parse().unwrap(), url)
                .json(body);
            let request = match key {
                Some(key) => request.bearer_auth(key),
                None => request,
            };
            request.send().await.unwrap().status().as_u16()
        };
        for (method, path, body) in administration() {
            let plain = if open { 401 } else { 403 };
            assert_eq!(
                ask(Some("plain"), method, path, &body).await,
                plain,
                "{path}"
            );
            assert_eq!(ask(None, method, path, &body).await, 401, "{path}");
            assert_eq!(ask(Some("boss"), method, path, &body).await, 200, "{path}");
        }
        let asked = json!({"inputs": "Hi", "parameters": {"max_new_tokens": 1}});
        for key in ["plain", "boss"] {
            assert_eq!(ask(Some(key), "POST", "/generate", &asked).await, 200);
            assert_eq!(ask(Some(key), "GET", "/v1/adapters", &json!({})).await, 200);
        }
        let anonymous = if open { 200 } else { 401 };
        assert_eq!(ask(None, "POST", "/generate", &asked).await, anonymous);
        assert_eq!(ask(None, "PUT", "/v1/adapters", &asked).await, 405);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_not_printed() {
    assert_eq!(format!("{:?}", Keys::new(["secret", "other"])), "2 keys");
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_over_the_limit_are_refused_announced_or_not() {
    let server = serve().await;
    let large = json!({"inputs": "x".repeat(100_001)});
    let (status, answer) = server.ask("/generate", large.clone()).await;
    assert_eq!((status, &answer["error_type"]), (413, &json!("too_large")));
    let chunks =
        futures::stream::iter((0..20).map(|_| Ok::<_, std::io::Error>("x".repeat(10_000))));
    let request = server
        .client
        .post(format!("{}/v1/completions", server.url))
        .header("content-type", "application/json");
    let (status, answer) = served::read(
        request
            .body(reqwest::Body::wrap_stream(chunks))
            .send()
            .await
            .unwrap(),
    )
    .await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (413, &json!("too_large"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_come_only_from_the_allowed_folder() {
    let server = serve().await;
    std::fs::create_dir(server.home.path().join("secret")).unwrap();
    served::write_adapter(&server.home.path().join("secret/x"), 8);
    std::os::unix::fs::symlink(
        server.home.path().join("secret/x"),
        server.home.path().join("adapters/link"),
    )
    .unwrap();
    for path in [
        "../secret/x",
        "/etc",
        "link",
        "warm/../../secret/x",
        ".",
        "..",
        "missing",
        "",
    ] {
        let (status, answer) = server
            .ask("/v1/adapters", json!({"name": "x", "path": path}))
            .await;
        assert_eq!(
            (status, &answer["error"]["code"]),
            (403, &json!("forbidden")),
            "{path} {answer}"
        );
        let told = answer["error"]["message"].as_str().unwrap();
        assert!(
            !told.contains(server.home.path().to_str().unwrap()),
            "no path of this machine: {told}"
        );
    }
    let (status, _) = server
        .ask("/download_lora_adapter", json!({"lora_id": "../secret/x"}))
        .await;
    assert_eq!(status, 403);
    let (status, _) = server.ask("/v1/adapters", json!({"id": "org/name"})).await;
    assert_eq!(status, 403, "the hub is off by default");
    let (status, _) = server
        .ask(
            "/download_lora_adapter",
            json!({"lora_id": "org/name", "hf_api_token": "hf_x"}),
        )
        .await;
    assert_eq!(status, 422);
    let closed = serve_with(|setup| setup.settings.lora_dir = None).await;
    assert_eq!(
        closed.ask("/v1/adapters", json!({"path": "warm"})).await.0,
        403
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn allowed_downloads_run_the_program_beside_this_one() {
    let home = tempfile::tempdir().unwrap();
    let program = home.path().join("text-generation-server");
    let fetched = home.path().join("fetched");
    served::write_adapter(&fetched, 4);
    let script = format!(
        "#!/bin/sh\nif [ \"$*\" != 'download-weights org/name --revision v2 --json' ]; then echo \"no $*\" >&2; exit 11; fi\n\
         echo '{{\"path\": \"{}\"}}'\n",
        fetched.display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(
        &program,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let server = serve_with(|setup| {
        setup.settings.allow_dynamic_lora = true;
        setup.settings.download_program = program;
    })
    .await;
    let (status, adapter) = server
        .ask("/v1/adapters", json!({"id": "org/name@v2"}))
        .await;
    assert_eq!(
        (status, &adapter["name"], &adapter["rank_max"]),
        (200, &json!("org/name"), &json!(4)),
        "{adapter}"
    );
    let body =
        json!({"inputs": "Hi", "parameters": {"adapter_id": "org/name", "max_new_tokens": 1}});
    assert_eq!(server.ask("/generate", body).await.0, 200);
    let (status, answer) = server.ask("/v1/adapters", json!({"id": "org/other"})).await;
    assert_eq!(status, 404, "{answer}");
    let (status, _) = server.ask("/v1/adapters", json!({"id": "--help/x"})).await;
    assert_eq!(status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_origins_are_not_served_until_allowed() {
    let server = serve().await;
    let answer = server
        .get("/health")
        .header("origin", "https://evil.example")
        .send()
        .await
        .unwrap();
    assert!(!answer.headers().contains_key("access-control-allow-origin"));
    let server =
        serve_with(|setup| setup.settings.cors_origins = vec!["https://good.example".to_owned()])
            .await;
    let allowed = |origin: &'static str| {
        let request = server.get("/health").header("origin", origin).send();
        async move {
            request
                .await
                .unwrap()
                .headers()
                .get("access-control-allow-origin")
                .cloned()
        }
    };
    assert_eq!(
        allowed("https://good.example").await.unwrap(),
        "https://good.example"
    );
    assert_eq!(allowed("https://evil.example").await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_star_lets_pages_of_any_origin_ask() {
    let server = serve_with(|setup| setup.settings.cors_origins = vec!["*".to_owned()]).await;
    let request = server
        .get("/health")
        .header("origin", "https://any.example");
    let answer = request.send().await.unwrap();
    assert_eq!(answer.headers()["access-control-allow-origin"], "*");
}

#[tokio::test(flavor = "multi_thread")]
async fn request_ids_are_kept_when_harmless_and_made_otherwise() {
    let server = serve().await;
    let id = |sent: &'static str| {
        let request = server.get("/info").header("x-request-id", sent).send();
        async move {
            request.await.unwrap().headers()["x-request-id"]
                .to_str()
                .unwrap()
                .to_owned()
        }
    };
    assert_eq!(id("abc-123").await, "abc-123");
    assert_eq!(id("a b\"c").await.len(), 32);
    assert_ne!(id("").await, id("").await);
}

async fn raw(server: &served::Served, request: &[u8]) -> (String, Duration) {
    let address = server.url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let (mut answer, start) = (vec![], Instant::now());
    let _ = tokio::time::timeout(Duration::from_secs(15), stream.read_to_end(&mut answer))
        .await
        .expect("closed in time");
    (
        String::from_utf8_lossy(&answer).into_owned(),
        start.elapsed(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_and_swollen_headers_are_cut() {
    let server = serve().await;
    let many: String = (0..80).map(|number| format!("x-{number}: y\r\n")).collect();
    let (answer, _) = raw(
        &server,
        format!("GET /health HTTP/1.1\r\nhost: x\r\n{many}\r\n").as_bytes(),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let wide = format!(
        "GET /health HTTP/1.1\r\nhost: x\r\nx-wide: {}\r\n\r\n",
        "y".repeat(64 * 1024)
    );
    let (answer, _) = raw(&server, wide.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let (_, held) = raw(&server, b"GET /health HTTP/1.1\r\nhost:").await;
    assert!(held < Duration::from_secs(12), "{held:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_routes_and_methods_answer_in_their_dialect() {
    let server = serve().await;
    let (status, answer) = server.look("/nowhere").await;
    assert_eq!((status, &answer["error_type"]), (404, &json!("not_found")));
    let (status, answer) = server.look("/v1/nowhere").await;
    assert_eq!(
        (status, answer["error"]["message"].is_string()),
        (404, true)
    );
    let (status, answer) = server.look("/generate").await;
    assert_eq!(
        (status, &answer["error_type"]),
        (405, &json!("method_not_allowed"))
    );
}
