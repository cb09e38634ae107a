//! Objects of S3, Google Cloud Storage, Azure and web servers, through the `object_store` crate, behind blocking calls.
//!
//! Credentials and endpoints come from the variables that each provider's own tools read (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT`, ...). A failed
//! or broken request is sent again with growing pauses ([`RETRIES`] times, up to [`PATIENCE`]); what then still fails is an error of its own kind,
//! which no `on_bad: Skip` takes for damaged data. Objects are streamed in pieces of [`CHUNK`] bytes, the next one under way while one is read.

use super::DataError;
use super::place::ReadSeek;
use bytes::Bytes;
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, RetryConfig};
use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// Bytes of one request of a stream.
const CHUNK: u64 = 4 << 20;

/// Attempts after the first.
const RETRIES: usize = 10;

/// Time after which no further attempt is made.
const PATIENCE: Duration = Duration::from_secs(60);

/// Threads that talk to stores, and the stores talked to, by scheme and bucket.
struct Stores {
    runtime: Runtime,
    open: Mutex<BTreeMap<String, Arc<dyn ObjectStore>>>,
}

fn stores(url: &Path) -> Result<&'static Stores, DataError> {
    static SHARED: OnceLock<Result<Stores, String>> = OnceLock::new();
    let made = SHARED.get_or_init(|| {
        // Another part of the program may have chosen its own; either will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("object-store")
            .enable_all()
            .build()
            .map_err(|e| format!("cannot start threads for object stores: {e}"))?;
        Ok(Stores {
            runtime,
            open: Mutex::default(),
        })
    });
    made.as_ref().map_err(|what| failed(url, what))
}

fn failed(url: &Path, what: impl std::fmt::Display) -> DataError {
    DataError::Remote {
        url: url.display().to_string(),
        what: what.to_string(),
    }
}

/// An object: its store and its key there.
#[derive(Clone)]
struct Object {
    url: PathBuf,
    store: Arc<dyn ObjectStore>,
    key: Key,
    stores: &'static Stores,
}

impl Object {
    fn at(url: &Path) -> Result<Self, DataError> {
        let stores = stores(url)?;
        let text = url.to_string_lossy().into_owned();
        let (scheme, rest) = text
            .split_once("://")
            .ok_or_else(|| failed(url, "not a URL"))?;
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(failed(
                url,
                "it names no bucket or host; expected scheme://bucket/key",
            ));
        }
        let is_web = scheme.starts_with("http");
        if is_web && key.contains(['?', '#']) {
            return Err(failed(
                url,
                "addresses with a query are not read; expected a plain one",
            ));
        }
        let key = if is_web {
            Key::from_url_path(key)
        } else {
            Key::parse(key.trim_end_matches('/'))
        };
        let key = key.map_err(|e| failed(url, e))?;
        let root = format!("{scheme}://{bucket}");
        let mut open = stores.open.lock().unwrap_or_else(PoisonError::into_inner);
        let store = match open.get(&root) {
            Some(store) => store.clone(),
            None => {
                let store = connect(scheme, &root).map_err(|e| failed(url, e))?;
                open.insert(root, store.clone());
                store
            }
        };
        Ok(Self {
            url: url.into(),
            store,
            key,
            stores,
        })
    }

    fn failed(&self, error: &object_store::Error) -> DataError {
        failed(&self.url, error)
    }

    /// Fetches a range in the background.
    fn fetch(&self, range: Range<u64>) -> JoinHandle<Result<Bytes, DataError>> {
        let object = self.clone();
        self.stores.runtime.spawn(async move {
            let want = range.end - range.start;
            let got = object.store.get_range(&object.key, range).await;
            let bytes = got.map_err(|e| object.failed(&e))?;
            if bytes.len() as u64 == want {
                Ok(bytes)
            } else {
                let what = format!("it gave {} of {want} bytes; did it change?", bytes.len());
                Err(failed(&object.url, what))
            }
        })
    }

    fn wait(&self, task: JoinHandle<Result<Bytes, DataError>>) -> Result<Bytes, DataError> {
        self.stores
            .runtime
            .block_on(task)
            .unwrap_or_else(|e| Err(failed(&self.url, e)))
    }
}

fn connect(scheme: &str, root: &str) -> object_store::Result<Arc<dyn ObjectStore>> {
    use object_store::{aws, azure, gcp, http};
    let retry = RetryConfig {
        backoff: BackoffConfig::default(),
        max_retries: RETRIES,
        retry_timeout: PATIENCE,
    };
    Ok(match scheme {
        "s3" => Arc::new(
            aws::AmazonS3Builder::from_env()
                .with_url(root)
                .with_retry(retry)
                .build()?,
        ),
        "gs" => Arc::new(
            gcp::GoogleCloudStorageBuilder::from_env()
                .with_url(root)
                .with_retry(retry)
                .build()?,
        ),
        "az" => Arc::new(
            azure::MicrosoftAzureBuilder::from_env()
                .with_url(root)
                .with_retry(retry)
                .build()?,
        ),
        _ => Arc::new(
            http::HttpBuilder::new()
                .with_url(root)
                .with_client_options(ClientOptions::new().with_allow_http(scheme == "http"))
                .with_retry(retry)
                .build()?,
        ),
    })
}

/// Bytes of an object; `None` when there is none.
pub(super) fn size(url: &Path) -> Result<Option<u64>, DataError> {
    let object = Object::at(url)?;
    let head = object.store.head(&object.key);
    match object.stores.runtime.block_on(head) {
        Ok(meta) => Ok(Some(meta.size)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(e) => Err(object.failed(&e)),
    }
}

/// See [`super::place::list`]. What lies below is looked for first: some servers know folders, and take one for an object.
pub(super) fn list(url: &Path) -> Result<Vec<PathBuf>, DataError> {
    let text = url.to_string_lossy();
    if !text.starts_with("http") {
        // Who may read an object need not be allowed to list; then the object itself is asked for.
        match below(url) {
            Ok(found) if found.is_empty() => {}
            Ok(found) => return Ok(found),
            Err(error) => tracing::debug!(%error, "no listing"),
        }
    }
    Ok(size(url)?.map(|_| url.into()).into_iter().collect())
}

/// All objects below a URL. One folder after the other: its listing names folders apart from objects, and no stream has to be driven.
fn below(url: &Path) -> Result<Vec<PathBuf>, DataError> {
    let text = url.to_string_lossy();
    let object = Object::at(url)?;
    let (mut folders, mut found) = (vec![object.key.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        let listing = object.store.list_with_delimiter(Some(&folder));
        let listing = object.stores.runtime.block_on(listing);
        let listing = listing.map_err(|e| object.failed(&e))?;
        let hidden = |key: &Key| key.filename().is_some_and(|n| n.starts_with('.'));
        folders.extend(listing.common_prefixes.into_iter().filter(|k| !hidden(k)));
        let keys = listing.objects.into_iter().map(|o| o.location);
        found.extend(keys.filter(|k| !hidden(k)));
    }
    found.sort();
    let bucket = text.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
    let whole = |key: Key| PathBuf::from(format!("{bucket}/{key}"));
    Ok(found.into_iter().map(whole).collect())
}

/// Some bytes.
pub(super) fn range(url: &Path, range: Range<u64>) -> Result<Bytes, DataError> {
    let object = Object::at(url)?;
    object.wait(object.fetch(range))
}

/// A stream from the start.
pub(super) fn open(url: &Path) -> Result<Box<dyn ReadSeek>, DataError> {
    let Some(size) = size(url)? else {
        return Err(DataError::NoFiles {
            path: url.into(),
            expected: "an object",
        });
    };
    Ok(Box::new(Stream {
        object: Object::at(url)?,
        size,
        at: 0,
        start: 0,
        chunk: Bytes::new(),
        ahead: None,
    }))
}

/// A task that is given up with its stream.
struct Ahead(u64, Option<JoinHandle<Result<Bytes, DataError>>>);

impl Drop for Ahead {
    fn drop(&mut self) {
        if let Some(task) = &self.1 {
            task.abort();
        }
    }
}

/// An object read from front to back.
struct Stream {
    object: Object,
    size: u64,
    at: u64,
    /// Offset of the piece at hand.
    start: u64,
    chunk: Bytes,
    ahead: Option<Ahead>,
}

impl Stream {
    fn piece(&self, from: u64) -> Range<u64> {
        from..(from + CHUNK).min(self.size)
    }

    fn fill(&mut self) -> Result<(), DataError> {
        let under_way = self.ahead.take();
        let task = under_way
            .filter(|a| a.0 == self.at)
            .and_then(|mut a| a.1.take());
        let task = task.unwrap_or_else(|| self.object.fetch(self.piece(self.at)));
        self.chunk = self.object.wait(task)?;
        self.start = self.at;
        let next = self.start + self.chunk.len() as u64;
        if next < self.size {
            self.ahead = Some(Ahead(next, Some(self.object.fetch(self.piece(next)))));
        }
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.at >= self.size || out.is_empty() {
            return Ok(0);
        }
        let held = self.start..self.start + self.chunk.len() as u64;
        if !held.contains(&self.at) {
            self.fill().map_err(std::io::Error::other)?;
        }
        let rest = &self.chunk[(self.at - self.start) as usize..];
        let n = rest.len().min(out.len());
        out[..n].copy_from_slice(&rest[..n]);
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for Stream {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => i128::from(at),
            SeekFrom::End(by) => i128::from(self.size) + i128::from(by),
            SeekFrom::Current(by) => i128::from(self.at) + i128::from(by),
        };
        let before = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        self.at = u64::try_from(at).map_err(|_| before())?;
        Ok(self.at)
    }
}
