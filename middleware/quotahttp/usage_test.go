package quotahttp_test

import (
	"encoding/json"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

// settled are the options that settle tokens by the answer.
func settled(errs *errorList) *quotahttp.Options {
	return &quotahttp.Options{Settle: map[string]func(quotahttp.Usage) int64{"tokens": quotahttp.Usage.Tokens}, Error: errs.tell, Refund: serverErrors}
}

// Bodies as the services write them.
const (
	openAI      = `{"id":"chatcmpl-1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"a \"usage\": {\"total_tokens\": 9}"}}],"usage":{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":4,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":3}}}`
	responses   = `{"id":"resp_1","object":"response","output":[{"type":"message","content":[]}],"usage":{"input_tokens":36,"input_tokens_details":{"cached_tokens":6},"output_tokens":87,"total_tokens":123}}`
	embeddings  = `{"object":"list","data":[{"embedding":[0.1,-0.2]}],"model":"m","usage":{"prompt_tokens":8,"total_tokens":8}}`
	anthropic   = `{"id":"msg_1","type":"message","content":[{"type":"text","text":"x"}],"usage":{"input_tokens":2095,"cache_creation_input_tokens":5,"cache_read_input_tokens":7,"output_tokens":503}}`
	openAIParts = "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}],\"usage\":null}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":7,\"total_tokens\":12}}\n\ndata: [DONE]\n\n"
	respParts   = "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"id\":\"r\",\"usage\":null}}\n\nevent: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"id\":\"r\",\"output\":[{\"usage\":{\"total_tokens\":1}}],\"usage\":{\"input_tokens\":37,\"output_tokens\":11,\"total_tokens\":48}}}\n\n"
	anthroStart = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"content\":[],\"usage\":{\"input_tokens\":25,\"cache_read_input_tokens\":3,\"output_tokens\":1}}}\n\nevent: ping\ndata: {\"type\": \"ping\"}\n\nevent: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"text\":\"usage\"}}\n\n"
	anthroParts = anthroStart + "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"input_tokens\":null,\"output_tokens\":15}}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
)

// TestUsage: the tokens that stay charged of an estimate of 100, after answers in the forms of OpenAI and
// Anthropic, in pieces of every size. none says that the answer tells no usage, and Error is told.
func TestUsage(t *testing.T) {
	const none = -1
	for name, test := range map[string]struct {
		kind, body string
		want       int64
	}{
		"OpenAI":                      {"application/json", openAI, 29},
		"OpenAI, responses":           {"application/json; charset=utf-8", responses, 123},
		"OpenAI, embeddings":          {"application/json", embeddings, 8},
		"Anthropic":                   {"application/json", anthropic, 2610},
		"OpenAI, stream":              {"text/event-stream", openAIParts, 12},
		"OpenAI, stream of responses": {"text/event-stream; charset=utf-8", respParts, 48},
		"Anthropic, stream":           {"text/event-stream", anthroParts, 43},
		"Anthropic, cut off":          {"text/event-stream", anthroStart, none},
		"CRLF":                        {"text/event-stream", strings.ReplaceAll(anthroParts, "\n", "\r\n"), 43},
		"CR":                          {"text/event-stream", strings.ReplaceAll(anthroParts, "\n", "\r"), 43},
		"no empty line at the end":    {"text/event-stream", strings.TrimRight(openAIParts, "\n"), 12},
		"data in two lines":           {"text/event-stream", "data: {\"usage\":\ndata:{\"total_tokens\":7}}\n\n", 7},
		"in every event: the last":    {"text/event-stream", "data: {\"usage\":{\"total_tokens\":5}}\n\ndata: {\"usage\":{\"total_tokens\":9}}\n\n", 9},
		"lines of JSON":               {"application/x-ndjson", "{\"usage\":{\"total_tokens\":5}}\n{\"usage\":{\"total_tokens\":9}}\n", 9},
		"no usage":                    {"application/json", `{"choices":[]}`, none},
		"null":                        {"application/json", `{"usage":null}`, none},
		"empty":                       {"application/json", `{"usage":{}}`, none},
		"of another form":             {"application/json", `{"usage":{"seconds":5}}`, none},
		"unknown":                     {"application/json", `{"usage":{"total_tokens":-1}}`, none},
		"some unknown":                {"application/json", `{"usage":{"prompt_tokens":-1,"total_tokens":6}}`, 6},
		"0":                           {"application/json", `{"usage":{"total_tokens":0}}`, 0},
		"not whole":                   {"application/json", `{"usage":{"total_tokens":1.5}}`, none},
		"too many":                    {"application/json", `{"usage":{"total_tokens":9007199254740993}}`, none},
		"beyond int64":                {"application/json", `{"usage":{"total_tokens":99999999999999999999}}`, none},
		"too deep":                    {"application/json", `{"choices":[{"usage":{"total_tokens":5}}],"x":{"usage":{"total_tokens":5}}}`, none},
		"in a list":                   {"application/json", `[{"usage":{"total_tokens":5}}]`, none},
		"in a text":                   {"application/json", `{"a":"\"usage\":{\"total_tokens\":5}","b":"usage","c":{"total_tokens":5}}`, none},
		"no JSON":                     {"application/json", `<html>"usage":{"total_tokens":5}`, none},
		"cut off":                     {"application/json", openAI[:len(openAI)-3], none},
		"more cached than read":       {"application/json", `{"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":50}}}`, 5},
		"an object that is too large": {"application/json", `{"usage":{"x":"` + strings.Repeat("x", 1<<14) + `","total_tokens":5}}`, none},
		"and one that is not, after":  {"application/json", `{"usage":{"x":"` + strings.Repeat("x", 1<<14) + `"},"response":{"usage":{"total_tokens":5}}}`, 5},
		"text":                        {"text/plain", openAI, none},
		"no type":                     {"", openAI, none},
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{1, 7, len(test.body)} {
				store := quotatest.New(t, nil)
				var errs errorList
				h := handler(t, store, settled(&errs), func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Content-Type", test.kind)
					for b := test.body; b != ""; {
						n := min(size, len(b))
						if n%2 == 0 {
							_, _ = io.WriteString(w, b[:n])
						} else {
							_, _ = w.Write([]byte(b[:n]))
						}
						b = b[n:]
					}
				}, byPeer(tokens).Cost(hundred))
				resp := send(h)
				if got := body(t, resp); got != test.body {
					t.Errorf("body: got %q, want %q", got, test.body)
				}
				want, told := test.want, 0
				if want == none {
					want, told = 100, 1
				}
				store.WantCharged(tokens, peerKey, want)
				if got := errs.take(); len(got) != told {
					t.Errorf("errors told: got %v, want %d", got, told)
				}
			}
		})
	}
}

// The parts of a usage, as functions of the program get them.
func TestUsageParts(t *testing.T) {
	for body, want := range map[string]quotahttp.Usage{
		openAI:    {Input: 15, Output: 10, CacheRead: 4},
		responses: {Input: 30, Output: 87, CacheRead: 6},
		anthropic: {Input: 2095, Output: 503, CacheRead: 7, CacheWrite: 5},
		`{"usage":{"prompt_tokens":5,"completion_tokens":6,"total_tokens":20}}`: {Input: 5, Output: 15},
	} {
		var got quotahttp.Usage
		o := &quotahttp.Options{Settle: map[string]func(quotahttp.Usage) int64{"tokens": func(u quotahttp.Usage) int64 {
			got = u
			return u.Output
		}}}
		store := quotatest.New(t, nil)
		send(handler(t, store, o, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, body)
		}, byPeer(tokens, minute)))
		if got != want {
			t.Errorf("usage of %s: got %+v, want %+v", body, got, want)
		}
		store.WantCharged(tokens, peerKey, want.Output)
		store.WantCharged(minute, peerKey, 1)
	}
}

// The handler's word counts more than the answer's, and no usage is missed where it was said, refused or
// compressed.
func TestUsageAndHandler(t *testing.T) {
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		want    int64
		told    int
	}{
		"settled":              {func(_ http.ResponseWriter, r *http.Request) { _ = quotahttp.From(r.Context()).Settle("tokens", 40) }, 40, 0},
		"refused":              {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(400) }, 100, 0},
		"failed":               {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, 0, 0},
		"failed, with a usage": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500); _, _ = io.WriteString(w, openAI) }, 29, 0},
		"compressed": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = io.WriteString(w, openAI)
		}, 100, 1},
		"not compressed": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "identity")
			_, _ = io.WriteString(w, openAI)
		}, 29, 0},
		"nothing": {func(http.ResponseWriter, *http.Request) {}, 100, 1},
	} {
		t.Run(name, func(t *testing.T) {
			store := quotatest.New(t, nil)
			var errs errorList
			send(handler(t, store, settled(&errs), func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				test.handler(w, r)
			}, byPeer(tokens).Cost(hundred)))
			store.WantCharged(tokens, peerKey, test.want)
			if got := errs.take(); len(got) != test.told {
				t.Errorf("errors told: got %v, want %d", got, test.told)
			}
		})
	}
	store := quotatest.New(t, nil)
	var errs errorList
	send(handler(t, store, settled(&errs), ok, byPeer(tokens)), func(r *http.Request) { r.Method = http.MethodHead })
	if got := errs.take(); len(got) != 0 {
		t.Errorf("errors told of an answer without a body: got %v, want none", got)
	}
}

// A function of the program's own reads each document, up to 1 MiB.
func TestReadUsage(t *testing.T) {
	store := quotatest.New(t, nil)
	var errs errorList
	o := settled(&errs)
	o.ReadUsage = func(document []byte) (quotahttp.Usage, bool) {
		var d struct{ Meta struct{ Billed *int64 } }
		if json.Unmarshal(document, &d) != nil || d.Meta.Billed == nil {
			return quotahttp.Usage{}, false
		}
		return quotahttp.Usage{Output: *d.Meta.Billed}, true
	}
	answer := func(kind, body string) {
		send(handler(t, store, o, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", kind)
			_, _ = io.WriteString(w, body)
		}, byPeer(tokens).Cost(hundred)))
	}
	answer("application/json", `{"meta":{"billed":7}}`)
	store.WantCharged(tokens, peerKey, 7)
	answer("text/event-stream", "data: {\"meta\":{\"billed\":1}}\n\ndata: {\"meta\":\ndata: {\"billed\":8}}\n\ndata: [DONE]\n\n")
	store.WantCharged(tokens, peerKey, 15)
	answer("application/json", `{"x":"`+strings.Repeat("x", 1<<20)+`","meta":{"billed":7}}`)
	store.WantCharged(tokens, peerKey, 115)
	answer("text/event-stream", "data: \""+strings.Repeat("x", 1<<20)+"\"\n\ndata: {\"meta\":{\"billed\":5}}\n\n")
	store.WantCharged(tokens, peerKey, 120)
	if got := errs.take(); len(got) != 1 {
		t.Errorf("errors told: got %v, want one, of the long document", got)
	}
}

// The memory that looking takes does not grow with the answer.
func TestUsageMemory(t *testing.T) {
	part := []byte(strings.Repeat("x", 1<<20))
	h := handler(t, quotatest.New(t, nil), settled(new(errorList)), func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"usage":{"x":"`)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range 64 {
			_, _ = w.Write(part)
		}
		runtime.ReadMemStats(&after)
		if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
			t.Errorf("memory for an answer of 64 MiB: got %d bytes, want less than 1 MiB", got)
		}
	}, byPeer(tokens))
	h.ServeHTTP(discard{http.Header{}}, requestOf(t))
}

// discard is a writer that keeps nothing.
type discard struct{ header http.Header }

func (d discard) Header() http.Header         { return d.header }
func (d discard) Write(p []byte) (int, error) { return len(p), nil }
func (d discard) WriteHeader(int)             {}

func requestOf(t *testing.T) *http.Request {
	t.Helper()
	r, err := http.NewRequest("GET", "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.RemoteAddr = "192.0.2.1:1"
	return r
}

// FuzzUsage: whatever the body is and however it is cut, no panic, the same usage for every cut, the body as
// it was, and no count below 0. A usage that encoding/json finds in a body is found.
func FuzzUsage(f *testing.F) {
	for _, s := range []string{openAI, responses, embeddings, anthropic, openAIParts, respParts, anthroParts, `{"usage":{"total_tokens":9e99}}`, `{"usage":{"usage":{}}}}}}{{{`, "data:\n\n\r\r\n", `{"a\"usage":{}}`} {
		f.Add(s, uint8(3), strings.HasPrefix(s, "data:"))
	}
	f.Fuzz(func(t *testing.T, text string, cut uint8, events bool) {
		kind := "application/json"
		if events {
			kind = "text/event-stream"
		}
		var found []quotahttp.Usage
		for _, size := range []int{int(cut) + 1, len(text) + 1} {
			h := handler(t, &answers{decisions: []quota.Decision{{Allowed: true, Capacity: 1000}}}, &quotahttp.Options{
				Error:  new(errorList).tell,
				Settle: map[string]func(quotahttp.Usage) int64{"tokens": func(u quotahttp.Usage) int64 { found = append(found, u); return 0 }},
			}, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", kind)
				for b := text; b != ""; {
					n := min(size, len(b))
					_, _ = io.WriteString(w, b[:n])
					b = b[n:]
				}
			}, byPeer(tokens))
			if got := body(t, send(h)); got != text {
				t.Errorf("body: got %q, want %q", got, text)
			}
		}
		if len(found) == 1 || len(found) == 2 && found[0] != found[1] {
			t.Errorf("usage by two cuts: got %+v, want two alike, or none", found)
		}
		for _, u := range found {
			if u.Input < 0 || u.Output < 0 || u.CacheRead < 0 || u.CacheWrite < 0 || u.Tokens() < 0 {
				t.Errorf("usage: got %+v, want no count below 0", u)
			}
		}
		var d map[string]json.RawMessage
		var u struct {
			Total int64 `json:"total_tokens"`
		}
		if !events && len(text) < 4096 && strings.Count(text, "usage") == 1 && json.Unmarshal([]byte(text), &d) == nil && json.Unmarshal(d["usage"], &u) == nil && u.Total > 0 && u.Total < 1e9 && len(found) == 0 {
			if json.Unmarshal(d["usage"], &struct {
				A, B, C, D, E, F int64
			}{}) == nil && strings.Count(text, "_tokens") == 1 {
				t.Errorf("usage of %q: got none, want %d", text, u.Total)
			}
		}
	})
}
