//! The filters that templates format with: numbers with units, text of a given width, JSON.
//!
//! A filter gets a value it cannot format only from a mistake in the template, so that is an error that names the
//! filter and what it was given. `null` is the exception: it stands for *unknown* everywhere in the context and is
//! printed as a dash.

use std::collections::HashMap;

use tera::{Error, Filter, Result, Tera, Value};

use super::text::{clip, visible, wrap};
use crate::units::{format_bytes, format_duration_s, format_rate, format_time_utc};

/// What is printed for a value that is not known.
const UNKNOWN: &str = "–";

type Args = HashMap<String, Value>;

/// Adds all filters to `tera`.
pub(super) fn register(tera: &mut Tera) {
    tera.register_filter("bytes", number("bytes", format_signed_bytes));
    tera.register_filter("rate", number("rate", format_rate));
    tera.register_filter("hourly", number("hourly", format_hourly));
    tera.register_filter("duration", number("duration", format_duration_s));
    tera.register_filter("time", number("time", format_time_utc));
    tera.register_filter("count", number("count", format_count));
    tera.register_filter("percent", number("percent", format_percent));
    tera.register_filter("hex", hex);
    tera.register_filter("text", |value: &Value, _: &Args| Ok(Value::String(visible(&plain("text", value)?).into())));
    tera.register_filter("fit", fit);
    tera.register_filter("wrap", wrapped);
    tera.register_filter("json", Json);
}

/// A filter over numbers. Integers above 2^53 lose their last digits, which no format here would show.
fn number(name: &'static str, format: fn(f64) -> String) -> impl Filter {
    move |value: &Value, _: &Args| match value {
        Value::Null => Ok(Value::String(UNKNOWN.to_owned())),
        _ => match value.as_f64() {
            Some(n) => Ok(Value::String(format(n))),
            None => Err(Error::msg(format!("filter `{name}` needs a number and was given {}", kind(value)))),
        },
    }
}

/// A whole number in hexadecimal with `0x`: offsets.
fn hex(value: &Value, _: &Args) -> Result<Value> {
    match (value, value.as_u64()) {
        (Value::Null, _) => Ok(Value::String(UNKNOWN.to_owned())),
        (_, Some(n)) => Ok(Value::String(format!("{n:#x}"))),
        _ => Err(Error::msg(format!("filter `hex` needs a whole number and was given {}", kind(value)))),
    }
}

/// Bytes for people, with a sign when negative: differences are printed with it too.
fn format_signed_bytes(n: f64) -> String {
    format!("{}{}", if n < 0.0 { "-" } else { "" }, format_bytes(n.abs() as u64))
}

/// Bytes per second as bytes per hour with a sign: growth of different sites in one unit, to be compared.
fn format_hourly(bytes_per_s: f64) -> String {
    let hourly = bytes_per_s * 3600.0;
    // Less than half a byte is no growth; a float to integer cast saturates.
    match hourly.abs().round() as u64 {
        0 => "0 B/h".to_owned(),
        n => format!("{}{}/h", if hourly < 0.0 { '-' } else { '+' }, format_bytes(n)),
    }
}

/// Thousands separated by commas; fractions are rounded.
pub fn format_count(n: f64) -> String {
    let digits = format!("{:.0}", n.abs());
    let mut out = String::with_capacity(digits.len() + digits.len() / 3 + 1);
    if n < 0.0 && digits != "0" {
        out.push('-');
    }
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A fraction as a percentage: more digits the smaller it is, and never `0 %` or `100 %` for what is not exactly that.
pub fn format_percent(fraction: f64) -> String {
    let p = fraction * 100.0;
    match p.abs() {
        a if a == 0.0 || a == 100.0 => format!("{p:.0} %"),
        a if a < 0.01 => "<0.01 %".to_owned(),
        a if a < 1.0 => format!("{p:.2} %"),
        a if (99.95..100.0).contains(&a) => ">99.9 %".to_owned(),
        a if a < 10.0 || (99.0..100.0).contains(&a) => format!("{p:.1} %"),
        _ => format!("{p:.0} %"),
    }
}

/// Text of exactly `width` characters: cut (`…`) or padded; `align="right"` pads on the left, `pad=false` only cuts.
fn fit(value: &Value, args: &Args) -> Result<Value> {
    let width = width("fit", args)?;
    let text = plain("fit", value)?;
    let text = visible(&text);
    let text = clip(&text, width);
    let fill = match args.get("pad") {
        Some(Value::Bool(false)) => String::new(),
        _ => " ".repeat(width.saturating_sub(text.chars().count())),
    };
    Ok(Value::String(match args.get("align").and_then(Value::as_str) {
        Some("right") => format!("{fill}{text}"),
        None | Some("left") => format!("{text}{fill}"),
        Some(other) => return Err(Error::msg(format!("filter `fit`: align is left or right, not {other:?}"))),
    }))
}

/// Lines of at most `width` characters, as an array for a loop.
fn wrapped(value: &Value, args: &Args) -> Result<Value> {
    let lines = wrap(&visible(&plain("wrap", value)?), width("wrap", args)?);
    Ok(Value::Array(lines.into_iter().map(Value::String).collect()))
}

/// The `width` argument: 1 to 10,000 characters.
fn width(name: &str, args: &Args) -> Result<usize> {
    let width = args.get("width").and_then(Value::as_u64).filter(|w| (1..=10_000).contains(w));
    match width {
        Some(w) => Ok(w as usize),
        None => Err(Error::msg(format!("filter `{name}` needs width=N with N from 1 to 10000"))),
    }
}

/// Scalars as text; `null` as a dash.
fn plain(name: &str, value: &Value) -> Result<String> {
    match value {
        Value::String(s) => Ok(s.clone()),
        Value::Number(n) => Ok(n.to_string()),
        Value::Bool(b) => Ok(b.to_string()),
        Value::Null => Ok(UNKNOWN.to_owned()),
        _ => Err(Error::msg(format!("filter `{name}` needs text or a number and was given {}", kind(value)))),
    }
}

/// What a value is, for messages.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// JSON that stays JSON inside a `<script>` element and in JavaScript: see [`script_json`].
pub(super) struct Json;

impl Filter for Json {
    fn filter(&self, value: &Value, _: &Args) -> Result<Value> {
        Ok(Value::String(script_json(&value.to_string())))
    }

    /// Its output is complete: escaping it once more would break it.
    fn is_safe(&self) -> bool {
        true
    }
}

/// Rewrites JSON text so that no `<`, `>`, `&`, U+2028 or U+2029 is left in it; it still means the same.
///
/// Outside of strings JSON has none of these, so replacing them everywhere is sound.
pub fn script_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len() + json.len() / 32);
    let mut done = 0;
    for (i, c) in json.char_indices() {
        let escape = match c {
            '<' => "\\u003c",
            '>' => "\\u003e",
            '&' => "\\u0026",
            '\u{2028}' => "\\u2028",
            '\u{2029}' => "\\u2029",
            _ => continue,
        };
        out.push_str(&json[done..i]);
        out.push_str(escape);
        done = i + c.len_utf8();
    }
    out.push_str(&json[done..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn apply(filter: &str, value: Value) -> std::result::Result<String, String> {
        let mut tera = Tera::default();
        register(&mut tera);
        tera.add_raw_template("t", &format!("{{{{ v | {filter} }}}}")).map_err(|e| format!("{e:?}"))?;
        let context = tera::Context::from_serialize(json!({ "v": value })).map_err(|e| e.to_string())?;
        tera.render("t", &context).map_err(|e| format!("{:#}", super::super::templates::chain(&e)))
    }

    /// Numbers are printed the same way everywhere; unknown is a dash, never a zero.
    #[test]
    fn numbers_get_their_units() {
        for (filter, value, expected) in [
            ("bytes", json!(1536), "1.5 KiB"),
            ("rate", json!(2048.0), "2.0 KiB/s"),
            ("hourly", json!(1.0), "+3.5 KiB/h"),
            ("hourly", json!(-0.01), "-36 B/h"),
            ("hourly", json!(0.0), "0 B/h"),
            ("duration", json!(200), "3m 20s"),
            ("time", json!(0), "1970-01-01T00:00:00.000Z"),
            ("count", json!(1_234_567), "1,234,567"),
            ("count", json!(-999), "-999"),
            ("count", json!(-0.2), "0"),
            ("percent", json!(0.0312), "3.1 %"),
            ("percent", json!(0.00001), "<0.01 %"),
            ("percent", json!(0.9999), ">99.9 %"),
            ("percent", json!(1), "100 %"),
            ("bytes", json!(-2048), "-2.0 KiB"),
            ("bytes", Value::Null, "–"),
            ("hex", json!(u64::MAX), "0xffffffffffffffff"),
            ("hex", Value::Null, "–"),
        ] {
            assert_eq!(apply(filter, value).as_deref(), Ok(expected), "{filter}");
        }
    }

    /// A wrong type is a mistake in the template, and the message must say which filter and what it got.
    #[test]
    fn a_number_filter_refuses_text_by_name() {
        let message = apply("bytes", json!("many")).unwrap_err();
        assert!(message.contains("filter `bytes` needs a number and was given text"), "{message}");
    }

    /// Columns stay columns whatever the names hold.
    #[test]
    fn fit_gives_exactly_the_width() {
        assert_eq!(apply("fit(width=6)", json!("ab")).as_deref(), Ok("ab    "));
        assert_eq!(apply("fit(width=6, align=\"right\")", json!(42)).as_deref(), Ok("    42"));
        assert_eq!(apply("fit(width=6)", json!("abc\ndefgh")).as_deref(), Ok("abc\\n…"));
        assert_eq!(apply("fit(width=6, pad=false)", json!("ab")).as_deref(), Ok("ab"));
        assert!(apply("fit", json!("ab")).unwrap_err().contains("needs width=N"));
        assert!(apply("fit(width=3, align=\"middle\")", json!("ab")).unwrap_err().contains("left or right"));
    }

    /// A name must not be able to end the script element that carries the data, nor a line of JavaScript.
    #[test]
    fn json_cannot_leave_its_script_element() {
        let name = "</script><!--&\u{2028}\u{2029}\"\\";
        let text = apply("json", json!({ "name": name })).unwrap_or_default();
        assert!(!text.contains(['<', '>', '&', '\u{2028}', '\u{2029}']), "{text}");
        let back: Value = serde_json::from_str(&text).expect("still JSON");
        assert_eq!(back["name"], name);
    }
}
