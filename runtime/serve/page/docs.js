// Fills the tables of /docs from /openapi.json.

const key = sessionStorage.getItem("key");
const answer = await fetch("/openapi.json", {headers: key ? {Authorization: `Bearer ${key}`} : {}});
const description = await answer.json();

function row(table, name, about) {
  const line = document.getElementById(table).insertRow();
  const code = document.createElement("code");
  code.textContent = name;
  line.insertCell().append(code);
  line.insertCell().textContent = about;
}

for (const [path, methods] of Object.entries(description.paths ?? {})) {
  for (const [method, call] of Object.entries(methods)) {
    row("calls", `${method.toUpperCase()} ${path}`, call.description ?? call.summary);
  }
}
const form = description.paths?.["/v1/videos"]?.post?.requestBody?.content?.["multipart/form-data"]?.schema;
for (const [name, field] of Object.entries(form?.properties ?? {})) row("fields", name, field.description ?? field.type);
document.body.dataset.ready = "yes";
