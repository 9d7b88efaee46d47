//! Quantities with units: how people write and read bytes, durations, rates and times.
//!
//! Parsing is strict and exact (a unit is never guessed) and turns into base units at once: bytes, [`Duration`],
//! bytes per second. There are two ways to print: [`Bytes`]' `Display` and [`format_duration`] are exact and can be
//! parsed back; the other `format_` functions round for people. All errors are sentences without a final stop that
//! quote the text in question.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Units of size and their bytes, smallest first. `kB` is 1000 bytes as in SI, `KiB` is 1024.
const SIZES: [(&str, u64); 8] = [
    ("B", 1),
    ("kB", 1_000),
    ("KiB", 1 << 10),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

/// Units of time and their nanoseconds, smallest first.
const TIMES: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("min", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
];

/// Most digits after the decimal point: keeps the arithmetic within 128 bits.
const MAX_FRACTION_DIGITS: usize = 12;

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl Bytes {
    /// Reads a size: a number, decimals allowed, and `B`, `kB`, `KiB`, `MB`, `MiB`, `GB`, `GiB` or `TiB`, with or
    /// without a space between; a plain number is bytes. A part of a byte is rounded to the nearest byte.
    ///
    /// # Errors
    /// No number, an unknown unit, or a size beyond 64 bits.
    pub fn parse(text: &str) -> Result<Bytes, String> {
        let (number, unit) = Number::split(text)?;
        let factor = match unit {
            "" => 1,
            _ => factor(&SIZES, unit).ok_or_else(|| unknown_unit("size", text, unit, &SIZES))?,
        };
        number.times(factor).and_then(|n| u64::try_from(n).ok()).map(Bytes).ok_or_else(|| too_large("size", text))
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Bytes::parse(text)
    }
}

/// Exact: the largest binary unit that leaves a whole number, such as `256KiB` or `1000B`.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, factor) = exact_unit(&SIZES, self.0, |name| name == "B" || name.ends_with("iB"));
        write!(f, "{}{name}", self.0 / factor)
    }
}

/// Reads a duration: numbers, decimals allowed, each with `ns`, `us`, `ms`, `s`, `m` (or `min`), `h` or `d`, from
/// large to small: `1s`, `1.5h`, `1m30s`, `2h 5min`. `0` needs no unit.
///
/// # Errors
/// No number, no unit, an unknown unit, units out of order, or a duration beyond 2^64 seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    let mut total_ns: u128 = 0;
    let mut previous = u64::MAX;
    loop {
        let (number, after) = Number::take(rest).ok_or_else(|| not_a("duration", text, "\"30s\" or \"1m30s\""))?;
        let after = after.trim_start();
        let end = after.find(|c: char| !c.is_alphabetic()).unwrap_or(after.len());
        let (unit, next) = after.split_at(end);
        if unit.is_empty() {
            return Err(match next {
                "" => format!("{text:?} has no unit; write for example \"{}s\" or \"{}ms\"", rest.trim(), rest.trim()),
                _ => not_a("duration", text, "\"30s\" or \"1m30s\""),
            });
        }
        let factor = factor(&TIMES, unit).ok_or_else(|| unknown_unit("duration", text, unit, &TIMES))?;
        if factor >= previous {
            return Err(format!("the units of {text:?} must go from large to small, each at most once"));
        }
        previous = factor;
        total_ns = (number.times(factor))
            .and_then(|ns| total_ns.checked_add(ns))
            .ok_or_else(|| too_large("duration", text))?;
        rest = next.trim_start();
        if rest.is_empty() {
            break;
        }
    }
    let seconds = u64::try_from(total_ns / 1_000_000_000).map_err(|_| too_large("duration", text))?;
    // The remainder is below 10^9, so the cast keeps it whole.
    Ok(Duration::new(seconds, (total_ns % 1_000_000_000) as u32))
}

/// Reads a rate as bytes per second: a size as of [`Bytes::parse`], `/` and a unit of time: `1KiB/min`, `64 B/s`.
/// `0` needs no unit.
///
/// # Errors
/// No `/`, or a size or unit of time that cannot be read.
pub fn parse_rate(text: &str) -> Result<f64, String> {
    let trimmed = text.trim();
    if trimmed == "0" {
        return Ok(0.0);
    }
    let Some((size, unit)) = trimmed.split_once('/') else {
        return Err(format!(
            "{text:?} is not a rate: the unit of time is missing; write for example \"{trimmed}/min\""
        ));
    };
    let (number, size_unit) = Number::split(size).map_err(|_| not_a("rate", text, "\"1KiB/min\""))?;
    let bytes = match size_unit {
        "" => 1,
        _ => factor(&SIZES, size_unit).ok_or_else(|| unknown_unit("rate", text, size_unit, &SIZES))?,
    };
    let unit = unit.trim();
    let ns = factor(&TIMES, unit).ok_or_else(|| unknown_unit("rate", text, unit, &TIMES))?;
    Ok(number.as_f64() * bytes as f64 * 1e9 / ns as f64)
}

/// Bytes for people: `0 B`, `512 B`, `1.5 KiB`, `12.0 MiB`.
pub fn format_bytes(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    scaled_bytes(bytes as f64)
}

/// A rate in bytes per second for people, in the unit of time that reads best: `1.5 KiB/s`, `2.0 KiB/min`,
/// `-12 B/h`. `unknown` when it is no finite number.
pub fn format_rate(bytes_per_s: f64) -> String {
    if !bytes_per_s.is_finite() {
        return "unknown".to_owned();
    }
    let magnitude = bytes_per_s.abs();
    let (value, unit) = if magnitude >= 1024.0 {
        (magnitude, "s")
    } else if magnitude * 60.0 >= 1024.0 {
        (magnitude * 60.0, "min")
    } else {
        (magnitude * 3600.0, "h")
    };
    let size = scaled_bytes(value);
    match size.as_str() {
        "0 B" => "0 B/s".to_owned(),
        _ => format!("{}{size}/{unit}", if bytes_per_s < 0.0 { "-" } else { "" }),
    }
}

/// A duration in seconds for people, two units at most: `0s`, `850us`, `12.5s`, `3m 20s`, `2h 5m`, `3d 4h`.
/// `unknown` when it is no finite number.
pub fn format_duration_s(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "unknown".to_owned();
    }
    let sign = if seconds < 0.0 { "-" } else { "" };
    let s = seconds.abs();
    if s < 59.95 {
        let (value, unit) = match s {
            _ if s < 0.5e-9 => return "0s".to_owned(),
            _ if s < 999.5e-9 => (s * 1e9, "ns"),
            _ if s < 999.5e-6 => (s * 1e6, "us"),
            _ if s < 0.9995 => (s * 1e3, "ms"),
            _ => (s, "s"),
        };
        let decimals = usize::from(value < 9.95 || unit == "s");
        let number = format!("{value:.decimals$}");
        return format!("{sign}{}{unit}", number.strip_suffix(".0").unwrap_or(&number));
    }
    // Float to integer casts saturate: centuries print as a large number of days.
    let whole = s.round() as u64;
    let (large, small) = match whole {
        0..3600 => ((whole / 60, "m"), (whole % 60, "s")),
        3600..86_400 => ((whole / 3600, "h"), (whole % 3600 / 60, "m")),
        _ => ((whole / 86_400, "d"), (whole % 86_400 / 3600, "h")),
    };
    match small.0 {
        0 => format!("{sign}{}{}", large.0, large.1),
        n => format!("{sign}{}{} {n}{}", large.0, large.1, small.1),
    }
}

/// A duration exactly, as [`parse_duration`] reads it: `1m30s`, `1s500ms`, `0s`.
pub fn format_duration(duration: Duration) -> String {
    let mut rest = duration.as_nanos();
    if rest == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    for (name, factor) in TIMES.iter().rev().filter(|(name, _)| *name != "min") {
        let n = rest / u128::from(*factor);
        rest %= u128::from(*factor);
        if n > 0 {
            text.push_str(&format!("{n}{name}"));
        }
    }
    text
}

/// Seconds since 1970 as RFC 3339 in UTC with milliseconds: `2025-03-01T12:30:05.250Z`.
///
/// Times before 1970, after the year 9999 or not finite become the nearest end of that range (NaN the lower one):
/// a broken clock must not break an alert.
pub fn format_time_utc(unix_s: f64) -> String {
    const LAST_MS: f64 = 253_402_300_799_999.0;
    // NaN passes `clamp` and becomes 0 in the cast.
    let ms = (unix_s * 1000.0).round().clamp(0.0, LAST_MS) as u64;
    let (days, ms_of_day) = (ms / 86_400_000, ms % 86_400_000);
    // Gregorian calendar in cycles of 400 years (146,097 days) that start on a 1 March, so that the leap day is the
    // last day of a year; 719,468 days lie between 0000-03-01 and 1970-01-01.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        ms_of_day / 3_600_000,
        ms_of_day / 60_000 % 60,
        ms_of_day / 1000 % 60,
        ms_of_day % 1000
    )
}

/// Reads a time in UTC as [`format_time_utc`] writes it, also without `Z`, fraction, seconds, or time of day, and with a
/// space in place of the `T`: seconds since 1970.
///
/// # Errors
/// It has another form, no such day, or is before 1970.
pub fn parse_time_utc(text: &str) -> Result<f64, String> {
    read_time_utc(text.trim()).ok_or_else(|| not_a("time", text, "\"2026-03-02T09:30:00Z\" or \"2026-03-02\""))
}

fn read_time_utc(text: &str) -> Option<f64> {
    let number = |text: &str, digits: usize| {
        let whole = text.len() == digits && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<u64>().ok().filter(|_| whole)
    };
    let (date, time) = text.split_once(['T', ' ']).unwrap_or((text, "00:00"));
    let mut date = date.split('-');
    let (year, month, day) = (number(date.next()?, 4)?, number(date.next()?, 2)?, number(date.next()?, 2)?);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        2 => 28 + u64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if year < 1970 || !(1..=length).contains(&day) || date.next().is_some() {
        return None;
    }
    // Years that begin in March, so that the leap day is the last one; 719,468 days lie between 0000-03-01 and 1970.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    let mut time = time.strip_suffix('Z').unwrap_or(time).split(':');
    let (hours, minutes) = (number(time.next()?, 2)?, number(time.next()?, 2)?);
    let (seconds, fraction) = time.next().map_or(("00", ""), |s| s.split_once('.').unwrap_or((s, "")));
    let seconds = number(seconds, 2)?;
    if hours > 23
        || minutes > 59
        || seconds > 59
        || time.next().is_some()
        || number(fraction, fraction.len()).is_none() && !fraction.is_empty()
    {
        return None;
    }
    let fraction: f64 = format!("0.{fraction}0").parse().ok()?;
    Some((days * 86_400 + hours * 3600 + minutes * 60 + seconds) as f64 + fraction)
}

/// A decimal number as it was written: exact, unlike a float.
#[derive(Clone, Copy)]
struct Number<'a> {
    whole: u128,
    fraction: &'a str,
}

impl<'a> Number<'a> {
    /// Takes digits and an optional fraction off the front; `None` when there are none or they are out of bounds.
    fn take(text: &'a str) -> Option<(Number<'a>, &'a str)> {
        let digits = |s: &str| s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
        let (whole, rest) = text.split_at(digits(text));
        let whole = whole.parse().ok()?;
        let Some(after_point) = rest.strip_prefix('.') else {
            return Some((Number { whole, fraction: "" }, rest));
        };
        let (fraction, rest) = after_point.split_at(digits(after_point));
        let within = !fraction.is_empty() && fraction.len() <= MAX_FRACTION_DIGITS;
        within.then_some((Number { whole, fraction }, rest))
    }

    /// Splits a whole text into number and unit.
    fn split(text: &'a str) -> Result<(Number<'a>, &'a str), String> {
        let (number, unit) = Number::take(text.trim()).ok_or_else(|| not_a("size", text, "\"64KiB\""))?;
        Ok((number, unit.trim_start()))
    }

    /// The number times a unit, rounded to nearest; `None` when it is out of bounds.
    fn times(self, factor: u64) -> Option<u128> {
        let whole = self.whole.checked_mul(u128::from(factor))?;
        if self.fraction.is_empty() {
            return Some(whole);
        }
        let scale = 10_u128.pow(u32::try_from(self.fraction.len()).ok()?);
        let part = self.fraction.parse::<u128>().ok()?.checked_mul(u128::from(factor))?;
        whole.checked_add((part + scale / 2) / scale)
    }

    /// The nearest float.
    fn as_f64(self) -> f64 {
        let part = format!("0.{}", self.fraction).parse().unwrap_or(0.0);
        self.whole as f64 + part
    }
}

/// Factor of a unit by name.
fn factor(units: &[(&str, u64)], name: &str) -> Option<u64> {
    units.iter().find(|(n, _)| *n == name).map(|(_, f)| *f)
}

/// The largest admitted unit that divides `value`; the unit of 1 for 0.
fn exact_unit(units: &[(&'static str, u64)], value: u64, admit: impl Fn(&str) -> bool) -> (&'static str, u64) {
    let fits = |(name, f): &&(&'static str, u64)| admit(name) && (*f == 1 || (value > 0 && value.is_multiple_of(*f)));
    units.iter().rev().find(fits).copied().unwrap_or(units[0])
}

/// A size of any magnitude with one decimal from 1 KiB on.
fn scaled_bytes(bytes: f64) -> String {
    // The bounds are those of rounding, so that 1023.96 KiB is printed as 1.0 MiB and not as 1024.0 KiB.
    if bytes < 1023.5 {
        return format!("{bytes:.0} B");
    }
    let mut value = bytes / 1024.0;
    let mut unit = "KiB";
    for next in ["MiB", "GiB", "TiB", "PiB", "EiB"] {
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

fn not_a(what: &str, text: &str, example: &str) -> String {
    format!("{text:?} is not a {what}; write for example {example}")
}

fn too_large(what: &str, text: &str) -> String {
    format!("the {what} {text:?} is too large")
}

fn unknown_unit(what: &str, text: &str, unit: &str, units: &[(&str, u64)]) -> String {
    let names: Vec<&str> = units.iter().map(|(n, _)| *n).collect();
    // Wrong case is the usual mistake: say which unit it would be.
    match names.iter().find(|n| n.eq_ignore_ascii_case(unit)) {
        Some(near) => format!("unknown unit {unit:?} in the {what} {text:?}; did you mean {near:?}?"),
        None => format!("unknown unit {unit:?} in the {what} {text:?}; known are {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every documented unit must count what it says; a wrong factor would silently move every threshold.
    #[test]
    fn sizes_are_read_in_every_unit() {
        let cases = [
            ("0", 0),
            ("17", 17),
            ("17B", 17),
            ("2kB", 2_000),
            ("2KiB", 2_048),
            ("3MB", 3_000_000),
            ("3MiB", 3 << 20),
            ("4GB", 4_000_000_000),
            ("4GiB", 4 << 30),
            ("5TiB", 5 << 40),
            (" 256 KiB ", 256 << 10),
            ("1.5KiB", 1_536),
            ("0.1KiB", 102),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in cases {
            assert_eq!(Bytes::parse(text), Ok(Bytes(bytes)), "{text}");
        }
    }

    /// A size that cannot be meant must be refused, with the way out in the message.
    #[test]
    fn bad_sizes_say_what_is_wrong() {
        let cases = [
            ("", "is not a size"),
            ("KiB", "is not a size"),
            ("-1KiB", "is not a size"),
            ("1.KiB", "is not a size"),
            ("1e3", "unknown unit \"e3\""),
            ("1kib", "did you mean \"KiB\"?"),
            ("1XB", "known are B, kB, KiB"),
            ("16777216TiB", "is too large"),
            ("340282366920938463463374607431768211456", "is not a size"),
            ("340282366920938463463374607431768211455KiB", "is too large"),
        ];
        for (text, part) in cases {
            let message = Bytes::parse(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    /// Every documented unit of time must count what it says.
    #[test]
    fn durations_are_read_in_every_unit() {
        let cases = [
            ("0", Duration::ZERO),
            ("0s", Duration::ZERO),
            ("7ns", Duration::from_nanos(7)),
            ("7us", Duration::from_micros(7)),
            ("7ms", Duration::from_millis(7)),
            ("7s", Duration::from_secs(7)),
            ("7m", Duration::from_secs(420)),
            ("7min", Duration::from_secs(420)),
            ("7h", Duration::from_secs(25_200)),
            ("7d", Duration::from_secs(604_800)),
            ("1.5s", Duration::from_millis(1_500)),
            ("1m30s", Duration::from_secs(90)),
            ("1d 2h 3min 4s 5ms", Duration::from_millis(93_784_005)),
        ];
        for (text, duration) in cases {
            assert_eq!(parse_duration(text), Ok(duration), "{text}");
        }
    }

    /// A duration without a unit is the classic way to be wrong by a factor of a thousand.
    #[test]
    fn bad_durations_say_what_is_wrong() {
        let cases = [
            ("10", "has no unit; write for example \"10s\""),
            ("1m30", "has no unit"),
            ("", "is not a duration"),
            ("s", "is not a duration"),
            ("-1s", "is not a duration"),
            ("1s!", "is not a duration"),
            ("5 parsecs", "unknown unit \"parsecs\""),
            ("5S", "did you mean \"s\"?"),
            ("30s1m", "from large to small"),
            ("1m1min", "from large to small"),
            ("18446744073709551616s", "is too large"),
        ];
        for (text, part) in cases {
            let message = parse_duration(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    /// Rates are compared with slopes in bytes per second, so the base unit must be exactly that.
    #[test]
    fn rates_are_read_as_bytes_per_second() {
        let cases =
            [("0", 0.0), ("64B/s", 64.0), ("6/s", 6.0), ("3KiB/min", 51.2), ("1.5 KiB / s", 1536.0), ("9kB/h", 2.5)];
        for (text, rate) in cases {
            assert_eq!(parse_rate(text), Ok(rate), "{text}");
        }
        for (text, part) in [
            ("1KiB", "write for example \"1KiB/min\""),
            ("x/s", "is not a rate"),
            ("1KiB/minute", "unknown unit \"minute\""),
            ("1kib/s", "did you mean \"KiB\"?"),
        ] {
            let message = parse_rate(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    /// Rounding must carry into the next unit: `1024.0 KiB` or `60s` would look like a bug to every reader.
    #[test]
    fn people_never_see_a_full_unit_of_the_smaller_kind() {
        assert_eq!(format_bytes(0), "0 B");
        assert_eq!(format_bytes(1023), "1023 B");
        assert_eq!(format_bytes(1536), "1.5 KiB");
        assert_eq!(format_bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(format_bytes(u64::MAX), "16.0 EiB");
        assert_eq!(format_duration_s(59.96), "1m");
        assert_eq!(format_duration_s(0.9999), "1s");
        assert_eq!(format_duration_s(3599.7), "1h");
    }

    /// The unit of time of a rate follows its size, and shrinking is shown.
    #[test]
    fn rates_pick_the_unit_of_time_that_reads_best() {
        assert_eq!(format_rate(0.0), "0 B/s");
        assert_eq!(format_rate(-0.0), "0 B/s");
        assert_eq!(format_rate(1536.0), "1.5 KiB/s");
        assert_eq!(format_rate(-2048.0), "-2.0 KiB/s");
        assert_eq!(format_rate(51.2), "3.0 KiB/min");
        assert_eq!(format_rate(1.0), "3.5 KiB/h");
        assert_eq!(format_rate(f64::NAN), "unknown");
    }

    /// Two units are enough to act on; more would only be noise.
    #[test]
    fn durations_for_people_have_two_units_at_most() {
        let cases = [
            (0.0, "0s"),
            (1e-12, "0s"),
            (2e-9, "2ns"),
            (0.000_85, "850us"),
            (0.25, "250ms"),
            (0.0015, "1.5ms"),
            (12.0, "12s"),
            (12.54, "12.5s"),
            (200.0, "3m 20s"),
            (7_500.0, "2h 5m"),
            (273_600.0, "3d 4h"),
            (-3.0, "-3s"),
            (f64::INFINITY, "unknown"),
        ];
        for (seconds, text) in cases {
            assert_eq!(format_duration_s(seconds), text);
        }
    }

    /// Known instants, among them leap days and both ends of the range.
    #[test]
    fn times_are_rfc_3339() {
        let cases = [
            (0.0, "1970-01-01T00:00:00.000Z"),
            (951_782_400.0, "2000-02-29T00:00:00.000Z"),
            (1_740_832_205.25, "2025-03-01T12:30:05.250Z"),
            (4_107_542_400.0, "2100-03-01T00:00:00.000Z"),
            (f64::NAN, "1970-01-01T00:00:00.000Z"),
            (-5.0, "1970-01-01T00:00:00.000Z"),
            (f64::INFINITY, "9999-12-31T23:59:59.999Z"),
        ];
        for (unix_s, text) in cases {
            assert_eq!(format_time_utc(unix_s), text, "{unix_s}");
        }
    }

    proptest! {
        /// What `Display` prints must be read back unchanged, or a setting echoed by `check` would lie.
        #[test]
        fn exact_bytes_survive_a_round_trip(bytes: u64, shift in 0_u32..40) {
            for n in [bytes, bytes >> 24 << shift] {
                prop_assert_eq!(Bytes::parse(&Bytes(n).to_string()), Ok(Bytes(n)));
            }
        }

        /// The same for durations, over the whole range of the type.
        #[test]
        fn exact_durations_survive_a_round_trip(seconds: u64, ns in 0_u32..1_000_000_000) {
            for d in [Duration::new(seconds, ns), Duration::from_secs(seconds % 100_000)] {
                prop_assert_eq!(parse_duration(&format_duration(d)), Ok(d));
            }
        }

        /// Rounded output may be off by the last digit only, whichever unit it picks.
        #[test]
        fn rounded_bytes_are_close(bytes in 0_u64..1 << 50) {
            let back = Bytes::parse(&format_bytes(bytes)).unwrap().0;
            prop_assert!(back.abs_diff(bytes) as f64 <= bytes as f64 * 0.05, "{bytes} {back}");
        }

        /// The same for rates: the unit of time must not change the value.
        #[test]
        fn rounded_rates_are_close(rate in 0.01_f64..1e12) {
            let back = parse_rate(&format_rate(rate)).unwrap();
            prop_assert!((back - rate).abs() <= rate * 0.05, "{rate} {back}");
        }

        /// The same for durations for people, from nanoseconds to decades.
        #[test]
        fn rounded_durations_are_close(exponent in -8.0_f64..9.0) {
            let seconds = 10_f64.powf(exponent);
            let back = parse_duration(&format_duration_s(seconds)).unwrap().as_secs_f64();
            prop_assert!((back - seconds).abs() <= seconds * 0.06, "{seconds} {back}");
        }

        /// No input may panic: all of it comes from users and files.
        #[test]
        fn no_text_panics(text in "[0-9.]{0,40}[a-zA-Z/ .µ]{0,6}[0-9.]{0,5}[a-z]{0,3}") {
            let _ = (Bytes::parse(&text), parse_duration(&text), parse_rate(&text));
        }
    }
}
