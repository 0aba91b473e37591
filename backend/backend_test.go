package backend_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/internal/redisurl"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

func init() {
	backend.Register("echo", []string{"echo", "shared"}, func(_ context.Context, u *url.URL) (quota.Store, error) {
		lastURL.Lock()
		defer lastURL.Unlock()
		lastURL.u = *u
		return local.New(), nil
	})
	backend.Register("other", []string{"shared"}, func(context.Context, *url.URL) (quota.Store, error) { return nil, nil })
	// A driver that quotes its URL, as careless ones do.
	backend.Register("leaky", []string{"leaky"}, func(_ context.Context, u *url.URL) (quota.Store, error) {
		password, _ := u.User.Password()
		switch u.Path {
		case "/raw":
			return nil, fmt.Errorf("%w: cannot use %s", quota.ErrUnavailable, u)
		case "/redacted":
			return nil, redacted{fmt.Errorf("%w: the URL has a user and no password", quota.ErrInvalid)}
		case "/plain":
			return nil, fmt.Errorf("%w: password %s", quota.ErrMisconfigured, password)
		case "/quoted":
			return nil, fmt.Errorf("password %q", password)
		case "/query":
			return nil, fmt.Errorf("%w: %q", context.DeadlineExceeded, u.Query().Get("sentinel_password"))
		}
		return nil, fmt.Errorf("%w: dial tcp %s: connection refused", quota.ErrUnavailable, u.Host)
	})
}

var lastURL struct {
	sync.Mutex
	u url.URL
}

func TestOpenMemory(t *testing.T) {
	bucket := algorithm.TokenBucket(10, 1, time.Hour)
	limit := quota.NewLimit("tokens", bucket)
	for _, test := range []struct {
		url  string
		keys int // how many fit; 0 is not tried
		ids  int // the same
	}{
		{"memory://", 0, 0},
		{"MEMORY://", 0, 0},
		{"memory:///", 0, 0},
		{"memory://?", 0, 0},
		{"memory://?client=memory", 0, 0},
		{"memory://?max_keys=1", 1, 0},
		{"memory://?max_keys=3", 3, 0},
		{"memory://?max_keys=2147483647", 0, 0},
		{"memory://?max_ids=1", 0, 1},
		{"memory://?max_ids=3&max_keys=9", 9, 3},
	} {
		store, err := backend.Open(t.Context(), test.url)
		if err != nil {
			t.Errorf("Open(%q): got %v, want nil", test.url, err)
			continue
		}
		for i := range test.keys + 1 {
			_, err := store.Charge(t.Context(), quota.Charge{Limit: limit, Key: fmt.Sprint("k", i), Cost: 1})
			if full := test.keys > 0 && i == test.keys; full != errors.Is(err, quota.ErrOverloaded) || !full && err != nil {
				t.Errorf("Open(%q): charge to key %d: got %v, want ErrOverloaded %v", test.url, i+1, err, full)
			}
		}
		for i := range test.ids + 1 { // of groups of their own, for one may have only half
			_, err := store.Charge(t.Context(), quota.Charge{Limit: limit, Key: fmt.Sprint("k", i%max(test.keys, 1)), Cost: 1, ID: fmt.Sprint("id", i)})
			if full := test.ids > 0 && i == test.ids; full != errors.Is(err, quota.ErrOverloaded) || !full && err != nil {
				t.Errorf("Open(%q): charge with id %d: got %v, want ErrOverloaded %v", test.url, i+1, err, full)
			}
		}
		if err := store.Close(); err != nil {
			t.Errorf("Close: got %v, want nil", err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, test := range []struct {
		url  string
		says []string
	}{
		{"", []string{"memory://", "redis+cluster://"}},
		{"localhost:6379", []string{"does not begin with a scheme"}},
		{"memory", []string{"does not begin with a scheme"}},
		{"memory:", []string{"does not begin with a scheme"}},
		{"://", []string{"does not begin with a scheme"}},
		{"memory://?maxkeys=1", []string{`"maxkeys"`, "accepted: max_keys"}},
		{"memory://?max_keys=1&b=1&a=2", []string{`"a", "b"`}},
		{"memory://?max_keys=0", []string{`max_keys is "0"`, "1 to 2147483647"}},
		{"memory://?max_keys=-1", []string{`max_keys is "-1"`}},
		{"memory://?max_keys=2147483648", []string{`max_keys is "2147483648"`}},
		{"memory://?max_keys=1e3", []string{`max_keys is "1e3"`}},
		{"memory://?max_keys=", []string{`max_keys is ""`}},
		{"memory://?max_keys=1&max_keys=2", []string{"2 times"}},
		{"memory://?max_ids=0", []string{"backend: open memory: invalid request: parameter max_ids is \"0\"", "1 to 2147483647"}},
		{"memory://?client=goredis", []string{"parameter client", "accepted: memory"}},
		{"memory://?a;b", []string{"parameters", "cannot be parsed"}},
		{"memory://host", []string{"accepted: memory://"}},
		{"memory:///path", []string{"accepted: memory://"}},
		{"memory://#f", []string{"accepted: memory://"}},
		{"mongodb://host", []string{`"mongodb"`, "import the driver's package"}},
		{"redis://host:port", []string{"cannot be parsed"}},
		{"shared://host", []string{"several drivers", "echo or other"}},
		{"shared://host?client=third", []string{"echo or other"}},
		{"redis://host?client=a&client=b", []string{"2 times"}},
	} {
		store, err := backend.Open(t.Context(), test.url)
		if !errors.Is(err, quota.ErrInvalid) || store != nil {
			t.Errorf("Open(%q): got %v, %v; want nil, ErrInvalid", test.url, store, err)
			continue
		}
		for _, s := range test.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("Open(%q): got %v, want it to say %q", test.url, err, s)
			}
		}
	}
}

func TestOpenNamesTheMissingImport(t *testing.T) {
	const (
		goredis = `import _ "github.com/fleetquota/fleetquota/backend/goredis"`
		rueidis = `import _ "github.com/fleetquota/fleetquota/backend/rueidis"`
	)
	for _, scheme := range redisurl.Schemes {
		for client, want := range map[string][2]bool{"": {true, true}, "?client=goredis": {true, false}, "?client=rueidis": {false, true}} {
			_, err := backend.Open(t.Context(), scheme+"://user:secret@host:6379/0"+client)
			if !errors.Is(err, quota.ErrInvalid) {
				t.Fatalf("%s: got %v, want ErrInvalid", scheme, err)
			}
			got := [2]bool{strings.Contains(err.Error(), goredis), strings.Contains(err.Error(), rueidis)}
			if got != want || !strings.Contains(err.Error(), scheme) {
				t.Errorf("%s%s: got %v, want the imports of goredis and rueidis: %v", scheme, client, err, want)
			}
		}
	}
}

func TestOpenChoosesTheDriver(t *testing.T) {
	store, err := backend.Open(t.Context(), "shared://h/p?client=echo&b=2&a=%20")
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	lastURL.Lock()
	defer lastURL.Unlock()
	if got, want := lastURL.u.String(), "shared://h/p?a=%20&b=2"; got != want {
		t.Errorf("URL of the driver: got %s, want %s", got, want)
	}
	if _, err := backend.Open(t.Context(), "shared://h?client=other"); !errors.Is(err, quota.ErrMisconfigured) {
		t.Errorf("driver that returns neither store nor error: got %v, want ErrMisconfigured", err)
	}
}

func TestOpenContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := backend.Open(ctx, "memory://"); !errors.Is(err, context.Canceled) {
		t.Errorf("Open with an ended context: got %v, want context.Canceled", err)
	}
}

// hostile are passwords that URL parsers stumble over, written as careless users write them.
var hostile = []string{
	"hunter2", "hun%ter2", "hunter2%zz", "hunter2/x", "/hunter2", "?hunter2", "1?hunter2", "1?hunter2=", "1?max_keys=hunter2",
	"1?client=hunter2", "1#hunter2", "1/hunter2", "hunter2 hunter2", "hunter2\x00", "hunter2\n", "[hunter2", "hunter2]:x", "@hunter2",
	"hunter2://", "p://hunter2", ":hunter2", "hunter2\\", `"hunter2"`, "hunter2é", "\xffhunter2", "%68unter2", "hunter2;a=b", "1?a;hunter2",
}

// redacted is an error that says of itself that it holds no credentials.
type redacted struct{ error }

func (r redacted) Unwrap() error { return r.error }
func (redacted) Redacted() bool  { return true }

func TestErrorsHoldNoCredentials(t *testing.T) {
	schemes := []string{"redis://", "rediss://", "redis+cluster://", "redis+sentinel://", "valkey://", "valkeys://", "memory://", "leaky://", "nosuch://", "", "://", "redis:", "redis:/"}
	for _, password := range hostile {
		for _, form := range []string{password, url.QueryEscape(password), url.PathEscape(password)} {
			for _, scheme := range schemes {
				for _, at := range []string{"user:%s@host:6379/0", ":%s@host:6379", "%s@host", ":%s@host/raw", ":%s@host/plain", "u:%s@host/quoted?db=1"} {
					raw := scheme + strings.Replace(at, "%s", form, 1)
					store, err := backend.Open(t.Context(), raw)
					if err == nil {
						store.Close()
						t.Errorf("Open(%q): got a store, want an error", raw)
						continue
					}
					for e := err; e != nil; e = errors.Unwrap(e) {
						if strings.Contains(e.Error(), "hunter2") || strings.Contains(e.Error(), "unter2@") {
							t.Errorf("Open(%q): got %v, want no password in it", raw, e)
						}
					}
				}
			}
		}
	}
}

func TestDriverErrors(t *testing.T) {
	for _, test := range []struct {
		url  string
		is   error
		says string
	}{
		{"leaky://user:secret@host/raw", quota.ErrUnavailable, "(not shown)"},
		{"leaky://user:sec%20ret@host/plain", quota.ErrMisconfigured, "(not shown)"},
		{"leaky://user:sec%22ret@host/quoted", quota.ErrMisconfigured, "(not shown)"},
		{"leaky://host/query?sentinel_password=secret", context.DeadlineExceeded, "(not shown)"},
		{"leaky://user:secret@host:1/", quota.ErrUnavailable, "dial tcp host:1: connection refused"},
		{"leaky://user:secret@host/raw", quota.ErrUnavailable, "unavailable: cannot use leaky://user:(not shown)@host/raw"},
		{"leaky://secret@host/raw", quota.ErrUnavailable, "unavailable: cannot use leaky://(not shown)@host/raw"},
		{"leaky://user:ost@host/raw", quota.ErrUnavailable, "withheld"},
		{"leaky://user:o@host/raw", quota.ErrUnavailable, "withheld"},
		{"leaky://user@host/redacted", quota.ErrInvalid, "the URL has a user and no password"},
	} {
		_, err := backend.Open(t.Context(), test.url)
		if !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.says) || strings.Contains(err.Error(), "secret") {
			t.Errorf("Open(%q): got %v, want %v that says %q", test.url, err, test.is, test.says)
		}
	}
}

func TestRegisterPanics(t *testing.T) {
	open := func(context.Context, *url.URL) (quota.Store, error) { return nil, nil }
	for name, register := range map[string]func(){
		"twice":     func() { backend.Register("echo", []string{"x"}, open) },
		"memory":    func() { backend.Register("memory", []string{"x"}, open) },
		"nil open":  func() { backend.Register("a", []string{"x"}, nil) },
		"no scheme": func() { backend.Register("b", nil, open) },
		"scheme":    func() { backend.Register("c", []string{"Redis"}, open) },
		"name":      func() { backend.Register("", []string{"x"}, open) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Register with %s: got no panic, want one", name)
				}
			}()
			register()
		}()
	}
	if got := backend.Schemes(); !slices.Equal(got, []string{"echo", "leaky", "memory", "shared", "tiny"}) {
		t.Errorf("Schemes(): got %v, want echo, leaky, memory, shared, tiny", got)
	}
}

func FuzzOpen(f *testing.F) {
	for _, password := range hostile {
		f.Add("redis", password)
		f.Add("memory", password)
		f.Add("leaky", password)
	}
	f.Fuzz(func(t *testing.T, scheme, password string) {
		const secret = "correcthorsebattery"
		raw := scheme + "://" + password + secret + "@host/raw"
		store, err := backend.Open(context.Background(), raw)
		if err != nil && strings.Contains(err.Error(), secret) && !strings.Contains(scheme, secret) {
			t.Errorf("Open(%q): got %v, want no password in it", raw, err)
		}
		if store != nil {
			store.Close()
		}
	})
}
