//! Chat templates of Hugging Face checkpoints: a conversation becomes the text that the model was trained to continue.
//!
//! A template is Jinja with Python's methods on strings and maps, block trimming on, and the functions `raise_exception` and
//! `strftime_now`. It stands in `chat_template.jinja`, or in `tokenizer_config.json` as a text or a list of named ones.

use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// One turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// Why there is no chat.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The checkpoint has no template.
    #[error(
        "no chat template in {path}; expected chat_template.jinja, or chat_template in tokenizer_config.json"
    )]
    NoTemplate {
        /// The folder.
        path: PathBuf,
    },
    /// A file that cannot be read.
    #[error("cannot read {path}: {why}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The template refuses the conversation, or is wrong.
    #[error("chat template: {0}")]
    Template(#[from] Error),
}

/// A checkpoint's template and its special tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplate {
    source: String,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Finds the template in a folder.
    ///
    /// # Errors
    /// [`ChatError::NoTemplate`], [`ChatError::Unreadable`].
    pub fn load(dir: &Path) -> Result<Self, ChatError> {
        let read = |name: &str| {
            let path = dir.join(name);
            match std::fs::read_to_string(&path) {
                Ok(text) => Ok(Some(text)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(ChatError::Unreadable {
                    path,
                    why: e.to_string(),
                }),
            }
        };
        let config: serde_json::Value = match read("tokenizer_config.json")? {
            Some(text) => serde_json::from_str(&text).map_err(|e| ChatError::Unreadable {
                path: dir.join("tokenizer_config.json"),
                why: e.to_string(),
            })?,
            None => serde_json::Value::Null,
        };
        let named = |list: &Vec<serde_json::Value>| {
            let default = list
                .iter()
                .find(|t| t["name"] == "default")
                .or(list.first());
            default
                .and_then(|t| t["template"].as_str())
                .map(str::to_string)
        };
        let inside = match &config["chat_template"] {
            serde_json::Value::String(s) => Some(s.clone()),
            serde_json::Value::Array(list) => named(list),
            _ => None,
        };
        let source = match read("chat_template.jinja")? {
            Some(text) => text,
            None => inside.ok_or_else(|| ChatError::NoTemplate {
                path: dir.to_path_buf(),
            })?,
        };
        // A special token is a text, or an object with its text in `content`.
        let token = |key: &str| {
            let t = &config[key];
            t.as_str()
                .or(t["content"].as_str())
                .unwrap_or_default()
                .to_string()
        };
        Ok(ChatTemplate {
            source,
            bos: token("bos_token"),
            eos: token("eos_token"),
        })
    }

    /// The text of a conversation, ending where the assistant is to speak.
    ///
    /// # Errors
    /// [`ChatError::Template`].
    pub fn render(&self, messages: &[Message]) -> Result<String, ChatError> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |why: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, why))
        });
        // Days since the epoch to a civil date (Howard Hinnant's algorithm); templates ask for dates only.
        env.add_function("strftime_now", |format: String| -> String {
            strftime(&format, seconds_now())
        });
        env.add_template("chat", &self.source)?;
        let text = env.get_template("chat")?.render(context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => self.bos,
            eos_token => self.eos,
        })?;
        Ok(text)
    }

    /// The token that ends a turn, empty when none is named.
    pub fn eos(&self) -> &str {
        &self.eos
    }
}

fn seconds_now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs() as i64)
}

/// The date fields of `strftime` in UTC: `%Y %m %d %b %B %H %M %S`; others stay as they are.
fn strftime(format: &str, seconds: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + i64::from(month <= 2);
    let name = MONTHS[(month - 1) as usize];
    let fields = [
        ("%Y", format!("{year}")),
        ("%m", format!("{month:02}")),
        ("%d", format!("{day:02}")),
        ("%B", name.to_string()),
        ("%b", name[..3].to_string()),
        ("%H", format!("{:02}", rest / 3600)),
        ("%M", format!("{:02}", rest / 60 % 60)),
        ("%S", format!("{:02}", rest % 60)),
    ];
    fields
        .iter()
        .fold(format.to_string(), |s, (k, v)| s.replace(k, v))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(role: &str, content: &str) -> Message {
        Message {
            role: role.into(),
            content: content.into(),
        }
    }

    #[test]
    fn templates_in_the_style_of_the_field_render() {
        let dir = tempfile::tempdir().unwrap();
        let template = "{{ bos_token }}{% for m in messages %}\n    {% if m['role'] not in ['user', 'assistant'] %}\n{{ raise_exception('no ' + m.role) }}\n    {% endif %}\n<|{{ m.role }}|>{{ m['content'].strip() }}{{ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}";
        let config = serde_json::json!({ "chat_template": template, "bos_token": { "content": "<s>" }, "eos_token": "</s>" });
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let chat = ChatTemplate::load(dir.path()).unwrap();
        let text = chat
            .render(&[say("user", " hello "), say("assistant", "hi")])
            .unwrap();
        assert_eq!(
            text,
            "<s><|user|>hello</s>\n<|assistant|>hi</s>\n<|assistant|>"
        );
        let e = chat.render(&[say("tool", "x")]).unwrap_err().to_string();
        assert!(e.contains("no tool"), "{e}");
    }

    #[test]
    fn a_folder_without_a_template_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let e = ChatTemplate::load(dir.path()).unwrap_err().to_string();
        assert!(e.contains("chat_template.jinja"), "{e}");
    }

    #[test]
    fn dates_are_civil_dates() {
        assert_eq!(
            strftime("%d %b %Y %H:%M:%S", 951_827_696),
            "29 Feb 2000 12:34:56"
        );
        assert_eq!(strftime("%Y-%m-%d", 0), "1970-01-01");
    }
}
