//! From the data of a checked run to a loader.

use super::rows::RowLoader;
use super::tasks::Task;
use super::text::{TextRows, TextSpec};
use super::{DataError, Loader, Worker};
use marimba_dsl::data::{Data, Tokenizer};

/// Opens `data` for rows of `seq_len` inputs, as `worker` of a fleet. `seed` is the run's, for data that does not state its own.
///
/// # Errors
/// [`DataError`]: files missing, empty, too short or damaged; parameters out of range.
pub fn open(
    data: &Data,
    seq_len: usize,
    seed: u64,
    worker: Worker,
) -> Result<Box<dyn Loader>, DataError> {
    match data {
        Data::Text(d) if d.tokenizer == Tokenizer::Bytes => {
            let spec = TextSpec {
                paths: vec![d.path.clone()],
                seq_len,
                valid_fraction: d.valid_fraction,
                valid_rows: d.valid_rows,
                raw_bytes: d.raw_bytes,
                seed: d.seed.unwrap_or(seed),
            };
            Ok(Box::new(RowLoader::new(TextRows::open(spec)?, worker)))
        }
        Data::Text(_) | Data::Tokens(_) | Data::Mixture(_) => Err(DataError::Parameter(format!(
            "{} data cannot be opened by this build",
            data.kind()
        ))),
        task => Ok(Box::new(RowLoader::new(
            Task::from_data(task, seq_len, seed)?,
            worker,
        ))),
    }
}
