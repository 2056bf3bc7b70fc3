//! Chat templates, rendered as transformers does.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value, context};
use serde_json::Value as Json;

use super::{Inexact, python};

/// A chat template, compiled.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    /// It loops over the parts of a message's content.
    pub takes_parts: bool,
    asks_clock: bool,
}

const NAME: &str = "chat";

impl Template {
    /// Compiles. `special`: names like `bos_token` with their texts.
    ///
    /// # Errors
    /// [`Inexact::Template`] where the dialect has what this one lacks.
    pub fn new(source: &str, special: &[(String, String)]) -> Result<Self, Inexact> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|_| Inexact::Template)?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| {
            std::fmt::Write::write_str(out, &python::text(value)?).map_err(|_| Error::from(ErrorKind::WriteFailure))
        });
        environment.add_filter("tojson", |value: Value, kwargs: Kwargs| python::tojson(&value, &kwargs));
        environment.add_filter("string", |value: Value| python::text(&value));
        environment.add_test("iterable", |value: Value| value.as_str().is_some() || value.try_iter().is_ok());
        environment.add_test("sequence", |value: Value| value.as_str().is_some() || value.try_iter().is_ok());
        environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        for (name, text) in special {
            environment.add_global(name.clone(), text.clone());
        }
        environment.add_template_owned(NAME, without_marks(source)).map_err(|_| Inexact::Template)?;
        let asks_clock = source.contains("strftime_now");
        let mut template = Self { environment, takes_parts: false, asks_clock };
        template.takes_parts = template.takes_parts();
        Ok(template)
    }

    /// Whether a content of parts comes out as its text: such a template loops over them.
    fn takes_parts(&self) -> bool {
        const PROBE: &str = "kvcellar-probe";
        let content = serde_json::json!([{"type": "text", "text": PROBE}]);
        let messages = serde_json::json!([{"role": "user", "content": content}]);
        let fields = serde_json::Map::new();
        let shown = self.text(&messages, None, &fields).unwrap_or_default();
        shown.contains(PROBE) && !shown.contains("'text'") && !shown.contains("\"text\"")
    }

    /// The prompt's text. `fields`: what else the template may ask for.
    ///
    /// # Errors
    /// [`Inexact`]: also where the template refuses the messages, which vLLM is to say.
    pub fn render(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        fields: &serde_json::Map<String, Json>,
    ) -> Result<String, Inexact> {
        if self.asks_clock {
            return Err(Inexact::Clock);
        }
        self.text(messages, tools, fields)
    }

    fn text(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        fields: &serde_json::Map<String, Json>,
    ) -> Result<String, Inexact> {
        let template = self.environment.get_template(NAME).map_err(|_| Inexact::Template)?;
        let known = context! {
            messages => Value::from(Serde(messages)),
            tools => tools.map_or_else(|| Value::from(()), |tools| Value::from(Serde(tools))),
            documents => Value::from(()),
            add_generation_prompt => true,
        };
        let fields = Value::from(Serde(fields));
        template.render(context! { ..fields, ..known }).map_err(|_| Inexact::Template)
    }
}

/// Without transformers' marks of what an assistant wrote, which leave no trace in the text.
fn without_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let Some(end) = rest[at..].find("%}").map(|end| at + end) else { break };
        let inner = &rest[at + 2..end];
        let word = inner.trim_matches(['-', '+', ' ', '\t', '\n']);
        let plain = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..at + 2]);
        match plain {
            Some(plain) => out.push_str(&inner.replace(word, plain)),
            None => out.push_str(inner),
        }
        out.push_str("%}");
        rest = &rest[end + 2..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &Json) -> Result<String, Inexact> {
        let special = [("bos_token".to_owned(), "<s>".to_owned())];
        Template::new(source, &special)?.render(messages, None, &serde_json::Map::new())
    }

    #[test]
    fn printed_as_python_would() {
        let messages = json!([{"role": "user", "content": "hi", "flag": true}]);
        let source = "{{ bos_token }}{% generation %}{% for m in messages %}{{ m.flag }} {{ m.none }}{{ m|tojson }}{% endfor %}{% endgeneration %}\n";
        assert_eq!(
            render(source, &messages).as_deref(),
            Ok(r#"<s>True {"role": "user", "content": "hi", "flag": true}"#)
        );
    }

    #[test]
    fn refusals_and_clocks_are_inexact() {
        assert_eq!(render("{{ raise_exception('no') }}", &json!([])), Err(Inexact::Template));
        assert_eq!(render("{{ strftime_now('%d') }}", &json!([])), Err(Inexact::Clock));
        assert_eq!(render("{% for", &json!([])), Err(Inexact::Template));
    }

    #[test]
    fn parts_are_taken_where_the_template_loops_over_them() {
        let loops = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}";
        let plain = "{% for m in messages %}{{ m.content }}{% endfor %}";
        assert!(Template::new(loops, &[]).is_ok_and(|it| it.takes_parts));
        assert!(Template::new(plain, &[]).is_ok_and(|it| !it.takes_parts));
    }
}
