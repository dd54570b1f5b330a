/* Writes a request as a line for the shell. Text goes through --form-string: -F would cut it at ';' and read a file for '@'. */

const INDENT = " \\\n    ";

/** One word for a POSIX shell: inside single quotes nothing has a meaning but the single quote. */
export function quoted(text) {
  return /^[\w%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", String.raw`'\''`)}'`;
}

/** A line that sends the same as the JSON body `{image, prompt, captions | a, b, ..}`; the key is named, never written. */
export function curlLine(url, body, needsKey) {
  const { captions = [], ...single } = body;
  const fields = [...Object.entries(single), ...captions.map((caption) => ["caption", caption])];
  const key = needsKey ? [`-H "Authorization: Bearer $PUNCHLINE_API_KEY"`] : [];
  return [`curl -sS ${quoted(url)}`, ...key, ...fields.map(([name, value]) => `--form-string ${name}=${quoted(String(value))}`)].join(INDENT);
}
