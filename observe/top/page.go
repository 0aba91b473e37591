package top

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// DefaultRows is how many rows of each ranking a page has, if its request does not say.
const DefaultRows = 50

// ServeHTTP serves the observer's own report, see [Handler].
func (t *Observer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	serve(w, r, func(context.Context) (Report, error) { return t.Report(), nil })
}

// Handler returns a handler that serves a report, such as one that [Merge] made of all processes' reports: as JSON where the
// request has format=json in its query or application/json in Accept, else as a page. n in the query is how many rows each
// ranking has at most; without it they are DefaultRows in a page, and all in JSON. Where the function fails the answer is 502
// with the error's text.
func Handler(report func(context.Context) (Report, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serve(w, r, report) })
}

func serve(w http.ResponseWriter, r *http.Request, report func(context.Context) (Report, error)) {
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	h.Set("Vary", "Accept")
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", "GET, HEAD")
		http.Error(w, "accepted: GET and HEAD", http.StatusMethodNotAllowed)
		return
	}
	query := r.URL.Query()
	asJSON := query.Get("format") == "json" || query.Get("format") == "" && strings.Contains(r.Header.Get("Accept"), "application/json")
	n := DefaultRows
	if text := query.Get("n"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil || n < 0 {
			http.Error(w, "n in the query is not a number of rows; accepted: 0 or more", http.StatusBadRequest)
			return
		}
	}
	rep, err := report(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	if !asJSON || query.Get("n") != "" {
		rep = rep.Top(n)
	}
	var body bytes.Buffer
	if asJSON {
		h.Set("Content-Type", "application/json")
		err = json.NewEncoder(&body).Encode(rep)
	} else {
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Content-Security-Policy", policy)
		err = page.Execute(&body, rep)
	}
	if err != nil { // of no report: all of its values can be written
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_, _ = w.Write(body.Bytes())
}

// visible returns a key as people see it: as it is, or as a Go string where it has characters that cannot be seen, or that
// turn the text around.
func visible(key string) string {
	for _, r := range key {
		if !unicode.IsPrint(r) || r == '"' || r == '\\' {
			return strconv.QuoteToGraphic(key)
		}
	}
	return key
}

const style = `
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; max-width: 70em; color: #222; background: #fff }
table { border-collapse: collapse; margin: .5em 0 2em }
th, td { padding: .15em 1em .15em 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums }
td.key { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
p.note { color: #555 }
`

// policy allows the page's own style, and nothing else.
var policy = fmt.Sprintf("default-src 'none'; style-src 'sha256-%s'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'", styleHash())

func styleHash() string {
	hash := sha256.Sum256([]byte(style))
	return base64.StdEncoding.EncodeToString(hash[:])
}

var page = template.Must(template.New("").Funcs(template.FuncMap{
	"visible": visible,
	"least":   func(r Row) int64 { return r.Weight - r.Error },
	"utc":     func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") },
}).Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Top keys</title>
<style>` + style + `</style>
</head>
<body>
<h1>Top keys</h1>
<p class="note">From {{utc .Since}} to {{utc .Until}}. The true weight of a key is between "at least" and "at most".</p>
{{- if .Uncounted}}
<p class="note">{{.Uncounted}} charges to further limits are not counted.</p>
{{- end}}
{{- range .Limits}}
<h2>{{visible .Limit}}</h2>
<h3>Denied</h3>
<p class="note">{{.Denied.Total}} tokens in all. A key that is not listed has at most {{.Denied.Absent}}.</p>
<table data-limit="{{.Limit}}" data-ranking="denied">
<thead><tr><th>key</th><th class="n">at least</th><th class="n">at most</th></tr></thead>
<tbody>
{{- range .Denied.Rows}}
<tr><td class="key"><bdi>{{visible .Key}}</bdi></td><td class="n">{{least .}}</td><td class="n">{{.Weight}}</td></tr>
{{- end}}
</tbody>
</table>
<h3>Used</h3>
<p class="note">{{.Used.Total}} tokens in all. A key that is not listed has at most {{.Used.Absent}}.</p>
<table data-limit="{{.Limit}}" data-ranking="used">
<thead><tr><th>key</th><th class="n">at least</th><th class="n">at most</th><th class="n">given back</th></tr></thead>
<tbody>
{{- range .Used.Rows}}
<tr><td class="key"><bdi>{{visible .Key}}</bdi></td><td class="n">{{least .}}</td><td class="n">{{.Weight}}</td><td class="n">{{.Back}}</td></tr>
{{- end}}
</tbody>
</table>
{{- else}}
<p>No limit was charged.</p>
{{- end}}
</body>
</html>
`))
