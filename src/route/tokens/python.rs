//! What chat templates expect of Python: `json.dumps`, `str()` and `repr()` of values.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use serde_json::Value as Json;

/// `repr` of a float.
pub fn float(number: f64) -> String {
    let text = format!("{number:?}");
    match text.split_once('e') {
        // Rust writes 1e-5 and 1e16, Python 1e-05 and 1e+16.
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text.replace("inf", "Infinity"),
    }
}

/// How `json.dumps` lays a value out.
#[derive(Debug, Clone)]
pub struct TemplateLayout {
    indent: Option<String>,
    comma: String,
    colon: String,
    sorted: bool,
    ascii: bool,
}

impl Default for TemplateLayout {
    fn default() -> Self {
        Self { indent: None, comma: ", ".to_owned(), colon: ": ".to_owned(), sorted: false, ascii: false }
    }
}

/// `json.dumps`.
pub fn dumps(value: &Json, layout: &TemplateLayout, depth: usize, out: &mut String) {
    match value {
        Json::Null => out.push_str("null"),
        Json::Bool(it) => out.push_str(if *it { "true" } else { "false" }),
        Json::Number(it) => match (it.as_i64(), it.as_u64(), it.as_f64()) {
            (Some(number), _, _) => out.push_str(&number.to_string()),
            (_, Some(number), _) => out.push_str(&number.to_string()),
            (_, _, number) => out.push_str(&float(number.unwrap_or(f64::NAN))),
        },
        Json::String(text) => quoted(text, layout.ascii, out),
        Json::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| (None, item)).collect();
            container(('[', ']'), &items, layout, depth, out);
        }
        Json::Object(fields) => {
            let mut items: Vec<_> = fields.iter().map(|(name, item)| (Some(name.as_str()), item)).collect();
            if layout.sorted {
                items.sort_by_key(|(name, _)| *name);
            }
            container(('{', '}'), &items, layout, depth, out);
        }
    }
}

fn container(
    (open, close): (char, char),
    items: &[(Option<&str>, &Json)],
    layout: &TemplateLayout,
    depth: usize,
    out: &mut String,
) {
    let new_line = |depth: usize, out: &mut String| {
        if let Some(indent) = &layout.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    };
    out.push(open);
    for (number, (name, item)) in items.iter().enumerate() {
        if number > 0 {
            out.push_str(&layout.comma);
        }
        new_line(depth + 1, out);
        if let Some(name) = name {
            quoted(name, layout.ascii, out);
            out.push_str(&layout.colon);
        }
        dumps(item, layout, depth + 1, out);
    }
    if !items.is_empty() {
        new_line(depth, out);
    }
    out.push(close);
}

fn escape(mark: &str, width: usize, code: u32, out: &mut String) {
    use std::fmt::Write;
    // Writing into a text does not fail.
    let _written = write!(out, "{mark}{code:0width$x}");
}

fn quoted(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            // Python's encoder leaves DEL alone unless it is asked for ASCII, and then it still
            // does.
            char if (char as u32) < 0x20 => escape("\\u", 4, char as u32, out),
            char if ascii && !char.is_ascii() => {
                let mut units = [0; 2];
                char.encode_utf16(&mut units).iter().for_each(|unit| escape("\\u", 4, u32::from(*unit), out));
            }
            char => out.push(char),
        }
    }
    out.push('"');
}

/// The filter `tojson` as transformers defines it.
pub fn tojson(value: &Value, kwargs: &Kwargs) -> Result<Value, Error> {
    let wrong = |what: &'static str| Error::new(ErrorKind::InvalidOperation, what);
    let json = serde_json::to_value(value).map_err(|_| wrong("not JSON"))?;
    let mut layout = TemplateLayout::default();
    if let Some(indent) = kwargs.get::<Option<Value>>("indent")?.filter(|indent| !indent.is_none()) {
        let width = usize::try_from(indent.clone()).ok();
        let text = width.map(|width| " ".repeat(width)).or_else(|| indent.as_str().map(str::to_owned));
        layout.indent = Some(text.ok_or_else(|| wrong("indent is neither a number nor text"))?);
        ",".clone_into(&mut layout.comma);
    }
    if let Some(separators) = kwargs.get::<Option<Value>>("separators")?.filter(|it| !it.is_none()) {
        let part = |at: usize| separators.get_item_by_index(at).ok().and_then(|it| it.as_str().map(str::to_owned));
        let (Some(comma), Some(colon)) = (part(0), part(1)) else { return Err(wrong("separators are two texts")) };
        (layout.comma, layout.colon) = (comma, colon);
    }
    layout.sorted = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    layout.ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut text = String::new();
    dumps(&json, &layout, 0, &mut text);
    Ok(Value::from_safe_string(text))
}

/// `str()`.
///
/// # Errors
/// Where Python's tables of printable characters would be needed to say.
pub fn text(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => repr(value),
    }
}

fn repr(value: &Value) -> Result<String, Error> {
    let text = match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
        }
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            let mut out = String::from(quote);
            for char in text.chars() {
                match char {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    char if char == quote => out.extend(['\\', char]),
                    char if char.is_ascii_control() => escape("\\x", 2, char as u32, &mut out),
                    char if char.is_ascii() || char.is_alphanumeric() => out.push(char),
                    _ => return Err(Error::new(ErrorKind::InvalidOperation, "a character that Python may escape")),
                }
            }
            out.push(quote);
            out
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<String> = value.try_iter()?.map(|item| repr(&item)).collect::<Result<_, _>>()?;
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let field = |name: Value| {
                let item = value.get_item(&name)?;
                Ok::<_, Error>(format!("{}: {}", repr(&name)?, repr(&item)?))
            };
            let fields: Vec<String> = value.try_iter()?.map(field).collect::<Result<_, _>>()?;
            format!("{{{}}}", fields.join(", "))
        }
        _ => value.to_string(),
    };
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_as_python_writes_them() {
        let cases =
            [(1.0, "1.0"), (1e16, "1e+16"), (1.5e-7, "1.5e-07"), (1e-5, "1e-05"), (0.0001, "0.0001"), (1e22, "1e+22")];
        for (number, wanted) in cases {
            assert_eq!(float(number), wanted);
        }
    }

    #[test]
    fn json_as_python_writes_it() {
        let value = json!({"b": [1, 2.0, {}], "a": "ü\"\n<", "n": null, "e": []});
        let mut out = String::new();
        dumps(&value, &TemplateLayout::default(), 0, &mut out);
        assert_eq!(out, r#"{"b": [1, 2.0, {}], "a": "ü\"\n<", "n": null, "e": []}"#);
        let mut out = String::new();
        let layout =
            TemplateLayout { indent: Some("  ".to_owned()), comma: ",".to_owned(), ..TemplateLayout::default() };
        dumps(&json!({"a": [1], "b": {}}), &layout, 0, &mut out);
        assert_eq!(out, "{\n  \"a\": [\n    1\n  ],\n  \"b\": {}\n}");
    }

    #[test]
    fn values_as_python_prints_them() {
        let value = Value::from(minijinja::value::Serde(json!({"a": [true, null, 1.0, "it's"]})));
        assert_eq!(text(&value).expect("printable"), "{'a': [True, None, 1.0, \"it's\"]}");
        assert!(text(&Value::from(vec!["\u{200b}"])).is_err());
    }
}
