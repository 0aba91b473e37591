// Command platforms checks that the packages and tests of the module in the working directory compile on the platforms
// in its arguments, such as linux/386:
//
//	go run ./internal/platforms linux/386 windows/amd64
//
// It checks types from source, for compiling all dependencies takes minutes a platform. Bodies of functions of
// dependencies are left out.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

func main() {
	c := checker{fset: token.NewFileSet(), files: map[string]*ast.File{}}
	for _, platform := range os.Args[1:] {
		n, err := c.check(platform)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", platform, err)
			c.failed = true
			continue
		}
		fmt.Printf("%s: %d packages and tests\n", platform, n)
	}
	if c.failed {
		os.Exit(1)
	}
}

// pkg is a package in the output of go list.
type pkg struct {
	ImportPath, Dir string
	GoFiles         []string
	ImportMap       map[string]string
	DepOnly         bool
	Module          *struct{ GoVersion string }
	Error           *struct{ Err string }
}

type checker struct {
	fset   *token.FileSet
	files  map[string]*ast.File // parsed, by path
	failed bool
}

// check checks one platform and returns the number of packages and tests of the module.
func (c *checker) check(platform string) (checked int, err error) {
	system, arch, ok := strings.Cut(platform, "/")
	sizes := types.SizesFor("gc", arch)
	if !ok || sizes == nil {
		return 0, errors.New("unknown platform; accepted: GOOS/GOARCH")
	}
	list, err := load(system, arch)
	if err != nil {
		return 0, err
	}
	done := map[string]*types.Package{"unsafe": types.Unsafe}
	for _, p := range list {
		if p.Error != nil {
			return 0, errors.New(p.Error.Err)
		}
		if done[p.ImportPath] != nil || strings.HasSuffix(p.ImportPath, ".test") { // a test's generated main
			continue
		}
		var files []*ast.File
		for _, name := range p.GoFiles {
			f, err := c.parse(filepath.Join(p.Dir, name))
			if err != nil {
				return 0, err
			}
			files = append(files, f)
		}
		config := types.Config{
			Sizes:            sizes,
			IgnoreFuncBodies: p.DepOnly,
			Importer: importer(func(path string) (*types.Package, error) {
				if mapped := p.ImportMap[path]; mapped != "" {
					path = mapped
				}
				if done[path] == nil {
					return nil, fmt.Errorf("%s is not loaded", path)
				}
				return done[path], nil
			}),
			Error: func(err error) {
				fmt.Fprintf(os.Stderr, "%s: %v\n", platform, err)
				c.failed = true
			},
		}
		if p.Module != nil && p.Module.GoVersion != "" {
			config.GoVersion = "go" + p.Module.GoVersion
		}
		// Errors are told above.
		done[p.ImportPath], _ = config.Check(p.ImportPath, c.fset, files, nil)
		if !p.DepOnly {
			checked++
		}
	}
	return checked, nil
}

func (c *checker) parse(path string) (*ast.File, error) {
	if f := c.files[path]; f != nil {
		return f, nil
	}
	f, err := parser.ParseFile(c.fset, path, nil, parser.SkipObjectResolution)
	c.files[path] = f
	return f, err
}

// load lists the module's packages and tests, each after the packages that it needs.
func load(system, arch string) (list []pkg, err error) {
	cmd := exec.Command("go", "list", "-deps", "-test", "-json=ImportPath,Dir,GoFiles,ImportMap,DepOnly,Module,Error", "./...")
	cmd.Env = append(os.Environ(), "GOOS="+system, "GOARCH="+arch, "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			return list, nil
		} else if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
}

type importer func(path string) (*types.Package, error)

func (i importer) Import(path string) (*types.Package, error) { return i(path) }
