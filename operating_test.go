package fleetquota_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// sender is a function that gives a notice with the name in a parameter.
type sender struct {
	dir, name string
	parameter int
}

// noticeNames returns the names of the notices that the code gives, with a place of each: in a quota.Notice, or handed to a
// function that makes one. The name must be a literal in one of the two.
func noticeNames(t *testing.T) map[string]string {
	t.Helper()
	files := token.NewFileSet()
	dirs := map[string][]*ast.File{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") || path == "bench" || path == "examples" || path == "conformance"):
			return filepath.SkipDir
		case filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		f, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		dirs[filepath.Dir(path)] = append(dirs[filepath.Dir(path)], f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	names, senders := map[string]string{}, map[sender]bool{}
	// name notes the name of a notice, or the function whose parameter it is, and reports whether that is a new one.
	name := func(dir string, in *ast.FuncDecl, value ast.Expr) bool {
		switch value := value.(type) {
		case *ast.BasicLit:
			if s, err := strconv.Unquote(value.Value); err == nil {
				names[s] = files.Position(value.Pos()).String()
				return false
			}
		case *ast.Ident:
			i := 0
			for _, field := range in.Type.Params.List {
				for _, p := range field.Names {
					if s := (sender{dir, in.Name.Name, i}); p.Name == value.Name {
						added := !senders[s]
						senders[s] = true
						return added
					}
					i++
				}
			}
		}
		t.Errorf("%s: the name of a notice is neither a literal nor a parameter", files.Position(value.Pos()))
		return false
	}
	for again := true; again; {
		again = false
		for dir, list := range dirs {
			for _, f := range list {
				for _, d := range f.Decls {
					in, ok := d.(*ast.FuncDecl)
					if !ok || in.Body == nil {
						continue
					}
					ast.Inspect(in, func(n ast.Node) bool {
						switch n := n.(type) {
						case *ast.CompositeLit:
							if s, ok := n.Type.(*ast.SelectorExpr); ok && s.Sel.Name == "Notice" {
								for _, e := range n.Elts {
									if kv := e.(*ast.KeyValueExpr); kv.Key.(*ast.Ident).Name == "Name" {
										again = name(dir, in, kv.Value) || again
									}
								}
							}
						case *ast.CallExpr:
							called := ""
							switch f := n.Fun.(type) {
							case *ast.Ident:
								called = f.Name
							case *ast.SelectorExpr:
								called = f.Sel.Name
							}
							for s := range senders {
								// Other methods of the name have no text at the place.
								if s.dir == dir && s.name == called && len(n.Args) > s.parameter && isText(n.Args[s.parameter]) {
									again = name(dir, in, n.Args[s.parameter]) || again
								}
							}
						}
						return true
					})
				}
			}
		}
	}
	return names
}

func isText(e ast.Expr) bool {
	l, ok := e.(*ast.BasicLit)
	return ok && l.Kind == token.STRING
}

// TestNoticesAreDocumented compares the names of the notices in the code with those in the table of docs/operating.md.
func TestNoticesAreDocumented(t *testing.T) {
	code := noticeNames(t)
	_, table, _ := strings.Cut(readPage(t, "docs/operating.md").text, "\n## Notices\n")
	table, _, _ = strings.Cut(table, "\n## ")
	documented := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`.*?) \\|").FindAllStringSubmatch(table, -1) {
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			if documented[m[1]] {
				t.Errorf("docs/operating.md: notice %q: got two rows, want one", m[1])
			}
			documented[m[1]] = true
		}
	}
	if len(code) < 15 {
		t.Errorf("notices in the code: got %v, want 15 or more", slices.Collect(maps.Keys(code)))
	}
	for name, place := range code {
		if !documented[name] {
			t.Errorf("%s: notice %q: got no row in docs/operating.md, want one", place, name)
		}
	}
	for name := range documented {
		if code[name] == "" {
			t.Errorf("docs/operating.md: got a row for the notice %q, which no code gives", name)
		}
	}
}

// TestSourcesAreDocumented checks that the table of sources has each source once.
func TestSourcesAreDocumented(t *testing.T) {
	_, table, _ := strings.Cut(readPage(t, "docs/operating.md").text, "\n## Sources\n")
	table, _, _ = strings.Cut(table, "\n## ")
	sources := quota.FromStore
	for ; sources.String() != "unknown"; sources++ {
		if n := strings.Count(table, "\n| `"+sources.String()+"` |"); n != 1 {
			t.Errorf("docs/operating.md: source %s: got %d rows, want 1", sources, n)
		}
	}
	if n := strings.Count(table, "\n| `"); n != int(sources) {
		t.Errorf("docs/operating.md: got %d rows of sources, want %d", n, sources)
	}
}

// TestSizing compares the memory that keys take in Redis with the formula of docs/operating.md, whose numbers are here.
func TestSizing(t *testing.T) {
	text := readPage(t, "docs/operating.md").text
	for _, want := range []string{"bytes = 140 + the name + the state", "the state is 32 bytes for a token bucket, 25 for a\nfixed or sliding window, and 18 + 14 for each charge in the window for a log"} {
		if !strings.Contains(text, want) {
			t.Errorf("docs/operating.md: got no %q, want it", want)
		}
	}
	server := redisserver.Start(t)
	store := quota.Must(backend.Open(t.Context(), "redis://"+server.Addr()))
	defer store.Close()
	used := func() int64 {
		info, err := server.Info("memory")
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.ParseInt(info["used_memory"], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, test := range []struct {
		limit          string
		keys, charges  int
		length, stated int64 // of the key, and of the state as the page says
	}{
		{"tokens: 1000 burst 1000/1h bucket", 20_000, 1, 20, 32},
		{"tokens: 1000 burst 1000/1h bucket", 20_000, 1, 80, 32},
		{"tokens: 1000/1h sliding", 20_000, 1, 40, 25},
		{"tokens: 1000/100h fixed", 20_000, 1, 40, 25},
		{"tokens: 1000/1h log", 400, 50, 40, 18 + 14*50},
	} {
		limit := quota.Must(algorithm.ParseLimit(test.limit))
		if _, err := server.Do("FLUSHALL"); err != nil {
			t.Fatal(err)
		}
		before := used()
		var wg sync.WaitGroup
		const goroutines = 50
		for g := range goroutines {
			wg.Go(func() {
				for i := g; i < test.keys; i += goroutines {
					key := fmt.Sprintf("%07d/%s", i, strings.Repeat("k", int(test.length)-8))
					for range test.charges {
						if _, err := store.Charge(t.Context(), quota.Charge{Limit: limit, Key: key, Cost: 7}); err != nil {
							t.Error(err)
							return
						}
					}
				}
			})
		}
		wg.Wait()
		got := (used() - before) / int64(test.keys)
		want := 140 + int64(len("quota:{}:tokens")) + test.length + test.stated
		if got > want*5/4 || got < want*3/4 {
			t.Errorf("%s, keys of %d bytes: got %d bytes a key, want %d, or a quarter more or less", test.limit, test.length, got, want)
		}
	}
}
