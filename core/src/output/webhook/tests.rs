use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};

use super::super::alerts::tests::event;
use super::*;

/// A server on loopback that gives one answer after the other, the last one for ever, and passes on what it got.
struct Server {
    url: String,
    requests: Receiver<(String, String)>,
}

const OK: &str = "HTTP/1.1 204 No Content\r\n\r\n";
const BUSY: &str = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n";

fn serve(answers: &'static [&'static str]) -> Server {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/hook?token=secret", listener.local_addr().unwrap());
    let (sender, requests) = channel();
    std::thread::spawn(move || {
        let mut answers = answers.iter();
        let mut answer = "";
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            answer = answers.next().unwrap_or(&answer);
            let Some(request) = read_request(&stream) else { continue };
            if sender.send(request).is_err() || (&stream).write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    });
    Server { url, requests }
}

/// Head and body of a request.
fn read_request(stream: &TcpStream) -> Option<(String, String)> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length = head.to_ascii_lowercase().split("content-length: ").nth(1)?.split("\r\n").next()?.parse().ok()?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((head, String::from_utf8(body).ok()?))
}

/// Three attempts with pauses of milliseconds.
fn start(url: &str, change: impl FnOnce(&mut WebhookSettings)) -> Webhook {
    let mut settings = WebhookSettings {
        url: url.to_owned(),
        timeout: Duration::from_secs(5),
        attempts: 3,
        queue: 10,
        ..WebhookSettings::default()
    };
    change(&mut settings);
    let ms = Duration::from_millis;
    Webhook::start_with(&settings, None, Pace { first: ms(2), most: ms(8), most_asked: ms(300) }).unwrap()
}

fn line(rule: &str) -> AlertLine {
    AlertLine::from(&event(rule))
}

const LONG: Duration = Duration::from_secs(20);

/// The usual case: the body is the documented line, and the type says so.
#[test]
fn alerts_are_posted_as_json_in_order() {
    let server = serve(&[OK]);
    let hook = start(&server.url, |_| {});
    hook.send(line("growth"));
    hook.send(line("survival"));
    let stats = hook.finish(LONG);
    assert_eq!(stats, WebhookStats { delivered: 2, ..WebhookStats::default() });
    let (head, body) = server.requests.recv().unwrap();
    assert!(head.starts_with("POST /hook?token=secret HTTP/1.1\r\n"), "{head}");
    let head = head.to_ascii_lowercase();
    assert!(head.contains("content-type: application/json\r\n"), "{head}");
    assert!(head.contains("user-agent: memleak/"), "{head}");
    assert_eq!(body, json_line(&line("growth")).unwrap());
    assert_eq!(server.requests.recv().unwrap().1, json_line(&line("survival")).unwrap());
}

/// A template decides body and type.
#[test]
fn a_template_makes_the_body() {
    let server = serve(&[OK]);
    let template = Some("chat.txt.tera".to_owned());
    let settings = WebhookSettings { url: server.url.clone(), template, ..WebhookSettings::default() };
    let hook = Webhook::start(&settings, Some(Box::new(|l| Ok(format!("look at {}", l.rule))))).unwrap();
    hook.send(line("growth"));
    assert_eq!(hook.finish(LONG).delivered, 1);
    let (head, body) = server.requests.recv().unwrap();
    assert_eq!(body, "look at growth");
    assert!(head.to_ascii_lowercase().contains("content-type: text/plain; charset=utf-8\r\n"), "{head}");
}

/// A template that fails costs its alert, not the thread.
#[test]
fn a_body_that_cannot_be_rendered_is_counted_and_the_next_is_sent() {
    let server = serve(&[OK]);
    let settings = WebhookSettings { url: server.url.clone(), ..WebhookSettings::default() };
    let render: Render = Box::new(|l| match &*l.rule {
        "broken" => Err(Error::new(ErrorKind::Template, "failed to render chat.json.tera")),
        _ => Ok(String::new()),
    });
    let hook = Webhook::start(&settings, Some(render)).unwrap();
    hook.send(line("broken"));
    hook.send(line("growth"));
    let stats = hook.finish(LONG);
    assert_eq!((stats.delivered, stats.failed), (1, 1));
    assert_eq!(stats.last_error.as_deref(), Some("failed to render chat.json.tera"));
}

/// A server that is being restarted must not cost an alert.
#[test]
fn a_server_error_is_tried_again() {
    let server = serve(&[BUSY, "HTTP/1.1 429 Too Many\r\nContent-Length: 0\r\n\r\n", OK]);
    let hook = start(&server.url, |_| {});
    hook.send(line("growth"));
    let stats = hook.finish(LONG);
    assert_eq!((stats.delivered, stats.failed, stats.retries), (1, 0, 2));
    assert_eq!(server.requests.try_iter().count(), 3);
}

/// Nobody listens: the attempts are used up, counted, and named without the secret in the address.
#[test]
fn a_refused_connection_is_given_up_after_all_attempts() {
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let hook = start(&format!("http://{address}/?token=secret"), |_| {});
    hook.send(line("growth"));
    let stats = hook.finish(LONG);
    assert_eq!((stats.delivered, stats.failed, stats.retries), (0, 1, 2));
    let error = stats.last_error.unwrap();
    assert!(error.contains("127.0.0.1") && !error.contains("secret"), "{error}");
}

/// What is wrong with the request stays wrong: one attempt, and no redirection to strangers.
#[test]
fn a_final_answer_is_not_tried_again() {
    for answer in ["HTTP/1.1 404 Not Found\r\n\r\n", "HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:1/\r\n\r\n"] {
        let server = serve(Box::leak(Box::new([answer])));
        let hook = start(&server.url, |_| {});
        hook.send(line("growth"));
        let stats = hook.finish(LONG);
        assert_eq!((stats.failed, stats.retries), (1, 0), "{answer}");
        assert_eq!(server.requests.try_iter().count(), 1, "{answer}");
    }
}

/// A server that says when to come back is obeyed, but not for an hour.
#[test]
fn retry_after_is_followed_within_bounds() {
    let server = serve(&["HTTP/1.1 503 Busy\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n", OK]);
    let hook = start(&server.url, |_| {});
    let start = Instant::now();
    hook.send(line("growth"));
    assert_eq!(hook.finish(LONG).delivered, 1);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(10), "{took:?}");
}

/// Pauses double up to a bound, vary by half, and give way to what the server asks for.
#[test]
fn pauses_grow_within_bounds() {
    let seconds = |failures, asked, chance| PACE.pause(failures, asked, chance).as_secs_f64();
    assert_eq!(seconds(1, None, 1.0), 0.5);
    assert_eq!(seconds(1, None, 0.0), 0.25);
    assert_eq!(seconds(3, None, 1.0), 2.0);
    assert_eq!(seconds(7, None, 1.0), 30.0);
    assert_eq!(seconds(u32::MAX, None, 0.0), 15.0);
    assert_eq!(seconds(1, Some(Duration::from_secs(7)), 1.0), 7.0);
    assert_eq!(seconds(7, Some(Duration::from_secs(7)), 1.0), 30.0);
    assert_eq!(seconds(1, Some(Duration::MAX), 1.0), 60.0);
}

/// A server that never answers must not hold up the collector, at no time: neither while running nor at the end.
#[test]
fn a_silent_server_holds_nobody_up() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let hook = start(&url, |s| s.timeout = Duration::from_secs(300));
    let start = Instant::now();
    hook.send(line("first"));
    // The thread is in its request from here on.
    while hook.stats().waiting > 0 && !hook.shared.lock().busy {
        std::thread::yield_now();
    }
    for _ in 0..25 {
        hook.send(line("growth"));
    }
    let stats = hook.stats();
    assert_eq!((stats.waiting, stats.dropped), (11, 15), "one under way, ten queued");
    let stats = hook.finish(Duration::from_millis(200));
    assert_eq!((stats.delivered, stats.failed, stats.waiting), (0, 11, 0));
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

/// A bounded queue keeps the newest: they say how things are now.
#[test]
fn a_full_queue_drops_the_oldest() {
    let server = serve(&[BUSY, OK]);
    let settings = WebhookSettings { url: server.url.clone(), queue: 2, ..WebhookSettings::default() };
    let pause = Duration::from_millis(300);
    let hook = Webhook::start_with(&settings, None, Pace { first: pause, most: pause, most_asked: pause }).unwrap();
    hook.send(line("0"));
    server.requests.recv().unwrap();
    // The thread pauses before its second attempt with "0".
    for rule in ["1", "2", "3", "4"] {
        hook.send(line(rule));
    }
    let stats = hook.finish(LONG);
    assert_eq!((stats.delivered, stats.dropped), (3, 2));
    let rule = |body: &str| serde_json::from_str::<serde_json::Value>(body).unwrap()["rule"].to_string();
    let rules: Vec<String> = server.requests.try_iter().map(|(_, body)| rule(&body)).collect();
    assert_eq!(rules, ["\"0\"", "\"3\"", "\"4\""]);
}

/// At the end there is a time for what is queued, and it is used.
#[test]
fn finishing_cuts_pauses_short() {
    let server = serve(&[BUSY]);
    let hook = Webhook::start_with(
        &WebhookSettings { url: server.url.clone(), ..WebhookSettings::default() },
        None,
        Pace { first: LONG, most: LONG, most_asked: LONG },
    )
    .unwrap();
    hook.send(line("growth"));
    server.requests.recv().unwrap();
    let start = Instant::now();
    let stats = hook.finish(Duration::from_millis(100));
    assert_eq!((stats.failed, stats.waiting), (1, 0));
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

/// An address that passes the first check but is none must be an error at the start.
#[test]
fn a_broken_address_is_an_error_at_the_start() {
    for url in ["http://[::1", "http://a b/", "http://"] {
        let settings = WebhookSettings { url: url.to_owned(), ..WebhookSettings::default() };
        assert!(Webhook::start(&settings, None).is_err(), "{url}");
    }
}

/// Receivers pick a parser by the type.
#[test]
fn the_type_of_the_body_follows_the_template() {
    assert_eq!(content_type(None), "application/json");
    assert_eq!(content_type(Some("alert.webhook.json.tera")), "application/json");
    assert_eq!(content_type(Some("x.html.tera")), "text/html; charset=utf-8");
    assert_eq!(content_type(Some("alert.txt.tera")), "text/plain; charset=utf-8");
}
