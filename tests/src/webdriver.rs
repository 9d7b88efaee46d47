//! A browser for tests: headless Chromium behind chromedriver, over plain WebDriver (JSON over HTTP on loopback).
//!
//! Every browser has a profile folder of its own and ends with its value. Failures panic: in a test there is nothing
//! better to do with them.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Time for chromedriver to start, and for each of its answers.
const PATIENCE: Duration = Duration::from_secs(60);

/// One browser window.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    session_url: String,
    agent: ureq::Agent,
    _profile: TempDir,
}

impl Browser {
    /// Starts a browser. The test asks for `Feature::Command("chromedriver")` first.
    pub fn start() -> Browser {
        let mut driver =
            // A process group of its own, so that Chromium can be ended with it whatever state they are in.
            (Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).process_group(0).spawn())
                .expect("chromedriver starts");
        let port = port(&mut driver);
        let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false);
        let agent = config.build().new_agent();
        let profile = tempfile::tempdir().expect("folder for the profile");
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--window-size=1280,900",
            &format!("--user-data-dir={}", profile.path().display()),
        ];
        let capabilities = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": { "args": arguments },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        } } });
        let server = format!("http://127.0.0.1:{port}/session");
        let mut browser = Browser { driver, session_url: server.clone(), agent, _profile: profile };
        let session = browser.send("", &capabilities);
        let id = session["sessionId"].as_str().expect("session id");
        browser.session_url = format!("{server}/{id}");
        browser
    }

    /// Opens a page and waits until it has loaded.
    pub fn open(&self, url: &str) {
        self.send("/url", &json!({ "url": url }));
    }

    /// Runs the body of a JavaScript function in the page and returns what it returns.
    pub fn run(&self, script: &str) -> Value {
        self.send("/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Runs `script` until it returns true.
    pub fn wait_for(&self, script: &str) {
        let start = Instant::now();
        while self.run(script) != Value::Bool(true) {
            assert!(start.elapsed() < Duration::from_secs(10), "still not true after 10 s: {script}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Clicks on the first element that matches the CSS selector, as a user: it must be visible.
    pub fn click(&self, selector: &str) {
        let element = self.element(selector);
        self.send(&format!("/element/{element}/click"), &json!({}));
    }

    /// Types into the first element that matches the CSS selector.
    pub fn keys(&self, selector: &str, text: &str) {
        let element = self.element(selector);
        self.send(&format!("/element/{element}/value"), &json!({ "text": text }));
    }

    /// Sends a command of the Chrome DevTools protocol.
    pub fn devtools(&self, command: &str, parameters: Value) -> Value {
        self.send("/goog/cdp/execute", &json!({ "cmd": command, "params": parameters }))
    }

    /// Makes the page believe in a screen of this size.
    pub fn resize(&self, width: u32, height: u32) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.devtools("Emulation.setDeviceMetricsOverride", metrics);
    }

    /// Takes the log of a kind (`browser` is the console, `performance` the DevTools events) since the last call.
    pub fn log(&self, kind: &str) -> Vec<Value> {
        match self.send("/se/log", &json!({ "type": kind })) {
            Value::Array(entries) => entries,
            other => panic!("log is no array: {other}"),
        }
    }

    /// Addresses that pages requested since the last call, also those that were refused or failed. What the browser's
    /// own pages load (it starts with a new tab) does not count.
    pub fn requests(&self) -> Vec<String> {
        let entries = self.log("performance");
        let message = |e: &Value| serde_json::from_str::<Value>(e["message"].as_str().unwrap_or_default()).ok();
        (entries.iter().filter_map(message))
            .filter(|m| m["message"]["method"] == "Network.requestWillBeSent")
            .map(|m| m["message"]["params"].clone())
            .filter(|p| !p["documentURL"].as_str().unwrap_or_default().starts_with("chrome://"))
            .filter_map(|p| p["request"]["url"].as_str().map(str::to_owned))
            .collect()
    }

    fn element(&self, selector: &str) -> String {
        let found = self.send("/element", &json!({ "using": "css selector", "value": selector }));
        let id = found.as_object().and_then(|o| o.values().next()).and_then(Value::as_str);
        id.unwrap_or_else(|| panic!("no element matches {selector}: {found}")).to_owned()
    }

    /// Sends a command and returns the answer's value.
    fn send(&self, path: &str, body: &Value) -> Value {
        let url = format!("{}{path}", self.session_url);
        let request = self.agent.post(&url).header("content-type", "application/json");
        let mut response = request.send(body.to_string()).unwrap_or_else(|e| panic!("{url}: {e}"));
        let text = response.body_mut().with_config().limit(64 << 20).read_to_string();
        let text = text.unwrap_or_else(|e| panic!("{url}: {e}"));
        let mut answer: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{url}: {e}: {text}"));
        assert_eq!(response.status().as_u16(), 200, "{url}: {text}");
        answer["value"].take()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Chromium ends with its session; when that hangs, with the group.
        let _ = self.agent.delete(&self.session_url).call();
        let group = libc::pid_t::try_from(self.driver.id()).expect("a pid fits");
        // SAFETY: no memory is involved; chromedriver has not been waited for, so the group is still its own.
        unsafe { libc::kill(-group, libc::SIGKILL) };
        let _ = self.driver.wait();
    }
}

/// The free port that chromedriver says it has chosen.
fn port(driver: &mut Child) -> u16 {
    let stdout = driver.stdout.take().expect("stdout is piped");
    let (sender, receiver) = mpsc::channel();
    // Goes on reading to the end, so that chromedriver never waits for its reader.
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if let Some((_, port)) = line.split_once("started successfully on port ") {
                let _ = sender.send(port.trim_end_matches('.').parse());
            }
        }
    });
    receiver.recv_timeout(PATIENCE).expect("chromedriver names its port").expect("a number")
}
